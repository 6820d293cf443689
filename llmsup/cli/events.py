"""`llmsup events`: the journal itself, so it works with no daemon."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from llmsup.cli import render, terminal
from llmsup.config.paths import paths
from llmsup.control.wire import EventInfo
from llmsup.host import logfile

FOLLOW_POLL_S = 0.1
WIDTH_LINES = 1000
"""So many of the last events tell how wide the column of names is, before others follow."""


TIME_MAX = 2**36
"""A wall time beyond it, in the year 4147, is none that was written."""
_DECODER = msgspec.json.Decoder(EventInfo)


def events(*, lines: int, follow: bool, as_json: bool) -> None:
    """Show the last events; then those that follow."""
    path = paths().events
    found = logfile.tail(path, lines)
    if lines and not found:
        terminal.say("nothing yet")
    news = logfile.follow(path, poll_s=FOLLOW_POLL_S, lines=lines) if follow else found
    if as_json:
        for line in news:
            if _event(line) is not None:
                terminal.show(line)
    else:
        _show(news, _subject_width(path) if follow else _widest(found))


def read(path: Path, lines: int) -> list[EventInfo]:
    """The events in the last lines of a journal; what is none is passed over."""
    found = map(_event, logfile.tail(path, lines))
    return [info for info in found if info is not None]


def _show(lines: Iterable[str], width: int) -> None:
    last_day = ""
    for line in lines:
        info = _event(line)
        if info is None:
            continue
        day = render.day(info)
        if day != last_day:
            terminal.show(day)
        last_day = day
        terminal.show(render.event(info, width=width))


def _subject_width(path: Path) -> int:
    return _widest(logfile.tail(path, WIDTH_LINES))


def _widest(lines: Iterable[str]) -> int:
    infos = (_event(line) for line in lines)
    return max((len(render.subject(info)) for info in infos if info is not None), default=0)


def _event(line: str) -> EventInfo | None:
    """The event of a line, or None for one that was cut off by a full disk or a loss of power."""
    try:
        info = _DECODER.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    return info if 0 <= info["time"] < TIME_MAX else None
