"""The event journal: one JSON object a line, appended as things happen."""

import json
import os
import time
from pathlib import Path

from llmsup.host.appending import Appender
from llmsup.host.private import open_private
from llmsup.troubles import Troubles


class Journal:
    """Appends events to a file. What a full disk does not take is written once it can be."""

    def __init__(self, path: Path, troubles: Troubles) -> None:
        self._path = path
        what = f"events are not being written to {path}"
        self._appender = Appender(self._append, troubles, what, _lost)

    def write(self, event: str, **fields: object) -> None:
        """Append one event with the wall clock and the monotonic time."""
        self._appender.append(_line(event, **fields))

    def _append(self, line: bytes) -> int:
        # Opened anew each time: somebody may have moved the file away.
        file = open_private(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            return os.write(file, line)
        finally:
            os.close(file)


def _line(event: str, **fields: object) -> bytes:
    record = {"time": time.time(), "at_s": time.monotonic(), "event": event, **fields}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _lost(count: int) -> bytes:
    return _line("daemon", why=f"{count} events before this one could not be written")
