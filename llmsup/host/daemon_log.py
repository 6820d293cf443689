"""The daemon's log where stderr is something else: a terminal, or the journal of systemd."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path


class _Beside(logging.StreamHandler):  # type: ignore[type-arg]
    """What cannot be written here is on stderr all the same."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - as logging has it
        """Go on."""


def write_beside_stderr(path: Path) -> None:
    """Log to the file `path`, too, unless stderr is that file already."""
    with suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _is_stderr(file):
            os.close(file)
            return
        handler = _Beside(os.fdopen(file, "a", encoding="utf-8", errors="backslashreplace"))
        root = logging.getLogger()
        for beside in root.handlers:
            handler.setFormatter(beside.formatter)
        root.addHandler(handler)


def _is_stderr(file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.fstat(sys.stderr.fileno()))
    except (OSError, ValueError, AttributeError):  # closed by whoever started us
        return False
