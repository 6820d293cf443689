"""Where words and data go: words to stderr, data to stdout."""

import json
import os
import shutil
import sys
from typing import TextIO


class OutputClosedError(Exception):
    """Whoever read our output has gone, as `head` does. Not an error: we just end."""


def show(text: str) -> None:
    """A piece of data, to stdout. Raises OutputClosedError."""
    _write(sys.stdout, text)


def show_json(value: object) -> None:
    """Data for programs, to stdout. Raises OutputClosedError."""
    show(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Words for a person, to stderr. Raises OutputClosedError."""
    _write(sys.stderr, text)


def is_live(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can be drawn on."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colour(stream: TextIO) -> bool:
    """Whether colours are wanted on `stream`: https://no-color.org."""
    return is_live(stream) and not os.environ.get("NO_COLOR")


def width(stream: TextIO) -> int | None:
    """The columns of the terminal; None where the output is not one and has no end."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        raise OutputClosedError from None
