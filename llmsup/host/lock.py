"""One daemon a home: an flock that dies with its process, so it is never stale."""

import fcntl
import os
from pathlib import Path

from llmsup.errors import LlmsupError


class Lock:
    """Holds the lock from `acquire` until the process ends. The file carries our pid."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def acquire(cls, path: Path) -> "Lock":
        """Take the lock. Raises LlmsupError with the holder's pid where it is taken."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip()
            os.close(file)
            raise LlmsupError(
                f"another daemon (pid {holder or 'unknown'}) holds {path}",
                hint="llmsup status shows it, llmsup stop ends it",
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        return cls(file)
