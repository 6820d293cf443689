"""Where words and data go: words to stderr, data to stdout."""

import json
import os
import sys
from contextlib import suppress
from typing import TextIO

from llmsup.errors import LlmsupError

WIDTH_UNKNOWN = 80


class OutputClosedError(Exception):
    """Whoever read our output has gone, as `head` does. Not an error: we just end."""


def prepare() -> None:
    """Let no character that the terminal's encoding lacks end a command."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def show(text: str) -> None:
    """A piece of data, to stdout. Raises OutputClosedError and LlmsupError."""
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        raise OutputClosedError from None
    except OSError as error:
        raise lost_output(error) from None


def show_json(value: object) -> None:
    """Data for programs, to stdout. Raises what `show` raises."""
    show(json.dumps(value, indent=2, ensure_ascii=not is_unicode(sys.stdout)))


def say(text: str) -> None:
    """Words for a person, to stderr; where nobody can hear them the command goes on."""
    try:
        _write(sys.stderr, text)
    except OSError:
        discard(sys.stderr)


def lost_output(error: OSError) -> LlmsupError:
    """The error of a write to stdout as one for a person."""
    discard(sys.stdout)
    return LlmsupError(f"cannot write the output: {error.strerror or error}")


def discard(stream: TextIO | None) -> None:
    """Send the rest of `stream` nowhere: what is buffered would fail again at our end."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        os.close(null)


def is_live(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal that can be drawn on."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def is_unicode(stream: TextIO | None) -> bool:
    """Whether `stream` takes every character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return encoding.lower().startswith("utf")


def has_colour(stream: TextIO | None) -> bool:
    """Whether colours are wanted on `stream`: https://no-color.org."""
    return is_live(stream) and not os.environ.get("NO_COLOR")


def width(stream: TextIO | None) -> int | None:
    """The columns of the terminal; None where the output is not one and has no end."""
    if stream is None or not stream.isatty():
        return None
    with suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or WIDTH_UNKNOWN
    return WIDTH_UNKNOWN


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed by whoever started us, as in `llmsup status >&-`
        return
    stream.write(text + "\n")
    stream.flush()
