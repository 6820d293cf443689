"""Lines for a file that may be full: what cannot be written waits, and comes first once it can."""

import errno
import os
from collections import deque
from collections.abc import Callable

from llmsup.troubles import Troubles

WAITING_MAX = 1000


class Appender:
    """Appends through `write`, which takes bytes and returns how many of them it wrote.

    `what` says what is lost while that fails, and `lost` is a line about so many lost lines:
    beyond `WAITING_MAX` they do not wait. Nothing is raised.
    """

    def __init__(
        self,
        write: Callable[[bytes], int],
        troubles: Troubles,
        what: str,
        lost: Callable[[int], bytes],
    ) -> None:
        self._write = write
        self._troubles = troubles
        self._what = what
        self._lost = lost
        self._lost_count = 0
        self._waiting: deque[bytes] = deque()

    def append(self, line: bytes) -> None:
        """Add a line, which ends with a newline."""
        if len(self._waiting) < WAITING_MAX:
            self._waiting.append(line)
        else:
            self._lost_count += 1
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        with self._troubles.watched(self._what, self.flush):
            while self._waiting:
                written = self._write(self._waiting[0])
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if rest := self._waiting[0][written:]:
                    self._waiting[0] = rest
                else:
                    self._waiting.popleft()
                if self._lost_count and not self._waiting:
                    self._waiting.append(self._lost(self._lost_count))
                    self._lost_count = 0
