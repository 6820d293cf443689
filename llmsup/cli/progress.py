"""Shows how the services get on: redrawn on a terminal, a line a change elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmsup.cli import render, terminal
from llmsup.cli.live import live
from llmsup.control.wire import Status

POLL_S = 0.05

Show = Callable[[Status], None]


@contextmanager
def progress() -> Iterator[Show]:
    """Yields the function that shows a snapshot, on stderr."""
    began = time.monotonic()
    if terminal.is_live(sys.stderr):
        with live(sys.stderr) as draw:
            yield lambda status: draw(
                render.services(
                    status["services"],
                    width=terminal.width(sys.stderr),
                    colour=terminal.has_colour(sys.stderr),
                )
            )
        return
    states: dict[str, str] = {}

    def show(status: Status) -> None:
        services = status["services"]
        for line in render.changes(states, services, time.monotonic() - began):
            terminal.say(line)
        states.update((service["service"], service["state"]) for service in services)

    yield show
