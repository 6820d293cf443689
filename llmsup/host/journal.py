"""The event journal: one JSON object a line, appended as things happen."""

import json
import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)


class Journal:
    """Appends events to a file. A full disk costs events, never the stack: said once in the log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_writable = True

    def write(self, event: str, **fields: object) -> None:
        """Append one event with the wall clock and the monotonic time."""
        record = {"time": time.time(), "at_s": time.monotonic(), "event": event, **fields}
        line = json.dumps(record, separators=(",", ":")) + "\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            file = os.open(self._path, flags, 0o600)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            if self._is_writable:
                log.warning("events are not being written: %s", error)
            self._is_writable = False
        else:
            self._is_writable = True
