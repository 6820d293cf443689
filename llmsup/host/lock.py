"""One daemon a home: an flock that dies with its process, so it is never stale."""

import fcntl
import os
import time
from pathlib import Path

from llmsup.errors import LlmsupError
from llmsup.host.private import open_private

LOOK_PATIENCE_S = 0.3
"""`llmsup status` holds the lock shared for an instant, to see whether a daemon has it."""


class Lock:
    """Holds the lock from `acquire` until the process ends. The file carries our pid."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def inherit(cls, file: int) -> "Lock":
        """The lock that the daemon we were before the execve held on to."""
        os.set_inheritable(file, False)
        return cls(file)

    def keep_over_exec(self) -> int:
        """Have the next program hold the lock; returns the descriptor to `inherit` it by."""
        os.set_inheritable(self._file, True)
        return self._file

    @classmethod
    def acquire(cls, path: Path) -> "Lock":
        """Take the lock. Raises LlmsupError with the holder's pid where it is taken."""
        try:
            file = open_private(path, os.O_RDWR)
        except OSError as error:
            raise LlmsupError(
                f"cannot open the lock {path}: {error.strerror}",
                hint="it must be a plain file of yours; remove what is there",
            ) from None
        deadline = time.monotonic() + LOOK_PATIENCE_S
        while not _is_taken(file):
            if time.monotonic() >= deadline:
                holder = os.pread(file, 32, 0).decode(errors="replace").strip()
                os.close(file)
                raise LlmsupError(
                    f"another daemon (pid {holder or 'unknown'}) holds {path}",
                    hint="llmsup status shows it, llmsup stop ends it",
                )
            time.sleep(0.01)
        try:
            # Cut off last: a full disk does not give back the block of an emptied file.
            pid = f"{os.getpid()}\n".encode()
            os.ftruncate(file, os.pwrite(file, pid, 0))
        except OSError as error:
            raise LlmsupError(f"cannot write the lock {path}: {error.strerror}") from None
        return cls(file)


def _is_taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
