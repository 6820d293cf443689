"""What the kernel counts of memory for a control group: version 2, version 1, and both mounted."""

from dataclasses import dataclass
from pathlib import Path

from llmsup.host import procfs

ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 2**60
"""Version 1 says "no limit" with a number of this order."""


@dataclass(frozen=True)
class GroupMemory:
    """One group. `max_bytes` is None without a limit of its own.

    `oom_kills`: its processes that the kernel has killed for memory, for whichever limit.
    """

    path: str
    current_bytes: int
    max_bytes: int | None
    oom_kills: int


def memory_group(pid: int, root: Path = ROOT) -> Path | None:
    """The directory that counts the memory of a process; None where none does, or it has gone."""
    groups = {}
    for line in procfs.read(pid, "cgroup").decode(errors="replace").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            groups[controller] = path.lstrip("/")
    candidates = []
    if "memory" in groups:
        candidates.append(root / "memory" / groups["memory"])
    if "" in groups:
        candidates.append(root / groups[""])
    return next((each for each in candidates if _counts_memory(each)), None)


def memory(group: Path) -> GroupMemory | None:
    """The figures of a group; None where it has gone."""
    try:
        if (group / "memory.events").exists():
            limit = (group / "memory.max").read_text().strip()
            return GroupMemory(
                str(group),
                int((group / "memory.current").read_text()),
                None if limit == "max" else int(limit),
                procfs.counter(group / "memory.events", "oom_kill"),
            )
        limit_bytes = int((group / "memory.limit_in_bytes").read_text())
        return GroupMemory(
            str(group),
            int((group / "memory.usage_in_bytes").read_text()),
            limit_bytes if limit_bytes < _UNLIMITED_BYTES else None,
            procfs.counter(group / "memory.oom_control", "oom_kill"),
        )
    except (OSError, ValueError):
        return None


def _counts_memory(group: Path) -> bool:
    return (group / "memory.events").exists() or (group / "memory.oom_control").exists()
