"""What this process and its children may run out of: room on a disk, and descriptors."""

import asyncio
import errno
import os
import resource
from pathlib import Path
from typing import Any

from llmsup.troubles import Troubles

PERIOD_S = 2.0
FREE_MIN_BYTES = 64 * 1024
DESCRIPTORS_MAX = 65536


def raise_descriptor_limit() -> None:
    """As many descriptors as we may have, up to a bound, for us and our children.

    The usual soft limit of 1024 is less than Envoy needs for the connections that it accepts.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bear(loop: asyncio.AbstractEventLoop) -> None:
    """Leave connections that cannot be accepted for want of descriptors to the loop's next try.

    It makes one in a second; by itself it would write a traceback each time.
    """

    def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}):
            loop.default_exception_handler(context)

    loop.set_exception_handler(note)


async def keep_watch(logs: Path, troubles: Troubles) -> None:
    """Tell, until cancelled, when what children write to `logs` is lost, or nothing can be opened.

    A child's write that fails is not seen by us, hence the look at the disk.
    """
    while True:
        with troubles.watched(f"output of services to {logs} is lost"):
            _require_room(logs)
        with troubles.watched("the daemon can start and ask nothing"):
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        await asyncio.sleep(PERIOD_S)


def _require_room(directory: Path) -> None:
    """Raise OSError where nothing can be written."""
    disk = os.statvfs(directory)
    if disk.f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if disk.f_bavail * disk.f_frsize < FREE_MIN_BYTES:
        # The figure is not the last word: root may have more, and ext4 keeps some for itself.
        file = os.open(directory, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, FREE_MIN_BYTES)
        finally:
            os.close(file)
