"""Files that only this user can read, opened without following what somebody put in their place."""

import errno
import os
import stat
from pathlib import Path


class NotOursError(OSError):
    """What stands at the path is no plain file of this user."""


def open_private(path: Path, flags: int) -> int:
    """Open the file, or make it, with mode 0600 whatever the umask.

    Raises OSError; NotOursError for a symbolic link, a pipe, or a file of somebody else.
    """
    # Not blocking: opening a pipe would wait for somebody to read from it.
    flags |= os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotOursError(error.errno, "it is a symbolic link", str(path)) from None
        if error.errno == errno.ENXIO:
            raise NotOursError(error.errno, "it is no plain file", str(path)) from None
        raise
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise NotOursError(errno.ENXIO, "it is no plain file", str(path))
        if found.st_uid != os.geteuid():
            raise NotOursError(errno.EPERM, f"it belongs to uid {found.st_uid}", str(path))
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(file, 0o600)
        os.set_blocking(file, True)
    except OSError:
        os.close(file)
        raise
    return file
