"""How many inotify instances this user may still open."""

import os
from pathlib import Path

LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")


def instances_left(proc: Path = Path("/proc"), limit: Path = LIMIT) -> int | None:
    """Instances that the kernel still grants to this user, or None where that cannot be told."""
    try:
        allowed = int(limit.read_text())
        processes = [entry for entry in proc.iterdir() if entry.name.isdigit()]
    except (OSError, ValueError):
        return None
    return allowed - sum(_instances(process) for process in processes)


def _instances(process: Path) -> int:
    """Instances that a process of this user holds; 0 for one of another user, or one just gone."""
    try:
        if process.stat().st_uid != os.getuid():
            return 0
        return sum(_is_inotify(descriptor) for descriptor in (process / "fd").iterdir())
    except OSError:
        return 0


def _is_inotify(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()) == "anon_inode:inotify"
    except OSError:
        return False
