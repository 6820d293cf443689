"""The daemon's own log: on stderr, and in its file where stderr is something else.

Either may be on a full disk. What cannot be written waits; logging's own handler would print a
traceback for each record, to the same full file.
"""

import logging
import os
from pathlib import Path

from llmsup.host.appending import Appender
from llmsup.host.private import open_private
from llmsup.troubles import Troubles

STDERR = 2
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class LogTo(logging.Handler):
    """Writes records to an open file. `what` is the trouble while it cannot be written."""

    def __init__(self, file: int, troubles: Troubles, what: str) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._appender = Appender(lambda line: os.write(file, line), troubles, what, _lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the record as a line."""
        self._appender.append(self.format(record).encode(errors="replace") + b"\n")


class LogToStderr(LogTo):
    """Writes records to stderr."""

    def __init__(self, troubles: Troubles) -> None:
        super().__init__(STDERR, troubles, "the daemon's log is not being written")


def write_beside_stderr(path: Path, troubles: Troubles) -> None:
    """Log to the file `path`, too, unless stderr, a terminal or systemd's journal, is that file."""
    what = f"{path} is not being written"
    with troubles.watched(what):
        file = open_private(path, os.O_WRONLY | os.O_APPEND)
        if _is_stderr(file):
            os.close(file)
        else:
            logging.getLogger().addHandler(LogTo(file, troubles, what))


def _is_stderr(file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.fstat(STDERR))
    except OSError:  # closed by whoever started us
        return False


def _lost(count: int) -> bytes:
    return f"{count} lines before this one could not be written\n".encode()
