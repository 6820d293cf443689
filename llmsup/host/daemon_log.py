"""The daemon's own log on stderr, which may be a file on a full disk."""

import logging
import os

from llmsup.host.appending import Appender
from llmsup.troubles import Troubles

STDERR = 2
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class LogToStderr(logging.Handler):
    """Writes records to stderr. What cannot be written waits; logging's own handler would print a
    traceback for each of them, to the same full file.
    """

    def __init__(self, troubles: Troubles) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        what = "the daemon's log is not being written"
        self._appender = Appender(lambda line: os.write(STDERR, line), troubles, what, _lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record as a line."""
        self._appender.append(self.format(record).encode(errors="replace") + b"\n")


def _lost(count: int) -> bytes:
    return f"{count} lines before this one could not be written\n".encode()
