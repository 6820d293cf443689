"""Shows how services get on: redrawn on a terminal, a line a change elsewhere."""

import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager

from llmsup.cli import render, terminal
from llmsup.cli.live import live
from llmsup.control.wire import ServiceInfo, Status

POLL_S = 0.05

Show = Callable[[Status], None]


@contextmanager
def progress(names: Container[str] | None = None) -> Iterator[Show]:
    """Yields the function that shows the named services, or all, of a snapshot on stderr."""
    show = _redrawn() if terminal.is_live(sys.stderr) else _line_by_line()
    with show as show_services:
        yield lambda status: show_services(
            [info for info in status["services"] if names is None or info["service"] in names]
        )


@contextmanager
def _redrawn() -> Iterator[Callable[[Sequence[ServiceInfo]], None]]:
    colour = terminal.has_colour(sys.stderr)
    with live(sys.stderr) as draw:
        yield lambda infos: draw(
            render.services(infos, width=terminal.width(sys.stderr), colour=colour)
        )


@contextmanager
def _line_by_line() -> Iterator[Callable[[Sequence[ServiceInfo]], None]]:
    began = time.monotonic()
    states: dict[str, str] = {}

    def show(infos: Sequence[ServiceInfo]) -> None:
        for line in render.changes(states, infos, time.monotonic() - began):
            terminal.say(line)
        states.update((info["service"], info["state"]) for info in infos)

    yield show
