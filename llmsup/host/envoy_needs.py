"""What Envoy needs of the machine. It is looked at first, because Envoy dies without saying why."""

import os
from pathlib import Path

from llmsup.config.paths import SOCKET_PATH_MAX_BYTES
from llmsup.errors import GatewayError
from llmsup.host import inotify
from llmsup.services.envoy import SPARE_INSTANCES, Layout

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Envoy's choice
SHARED_MEMORY_MIN_BYTES = 1024 * 1024


def require_possible(layout: Layout, route_count: int) -> None:
    """Raise GatewayError where an Envoy with so many routes could not start."""
    for socket in layout.sockets:
        if len(os.fsencode(socket)) > SOCKET_PATH_MAX_BYTES:
            raise GatewayError(
                f"the path {socket} is too long for a socket",
                hint="set LLMSUP_HOME to a shorter directory",
            )
    needed = route_count + SPARE_INSTANCES
    left = inotify.instances_left()
    if left is not None and left < needed:
        raise GatewayError(
            f"{route_count} routes need {needed} inotify instances and {left} are left",
            hint="raise the limit: sudo sysctl fs.inotify.max_user_instances=1024",
        )
    free_bytes = _free_bytes(SHARED_MEMORY)
    # With less, the first write to its mapped file ends Envoy with SIGBUS.
    if free_bytes is not None and free_bytes < SHARED_MEMORY_MIN_BYTES:
        raise GatewayError(
            f"{SHARED_MEMORY} has {free_bytes // 1024} KiB free and Envoy needs 1 MiB there",
            hint=f"remove files from {SHARED_MEMORY}; in a container, raise --shm-size",
        )


def _free_bytes(directory: Path) -> int | None:
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
