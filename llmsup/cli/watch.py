"""`llmsup status --watch`."""

import sys
import time

from llmsup.cli import render, terminal
from llmsup.cli.live import live
from llmsup.config.paths import paths
from llmsup.control.client import Client
from llmsup.errors import LlmsupError, UsageError

PERIOD_S = 1.0


def watch() -> None:
    """Redraw the status every second until Ctrl-C; a daemon that goes away may come back."""
    if not terminal.is_live(sys.stdout):
        raise UsageError("--watch needs a terminal", hint="llmsup events -f follows in a pipe")
    client = Client(paths())
    with live(sys.stdout) as draw:
        while True:
            draw(_look(client))
            time.sleep(PERIOD_S)


def _look(client: Client) -> str:
    try:
        snapshot = client.status()
    except LlmsupError as error:
        return error.message
    return render.status(
        snapshot,
        width=terminal.width(sys.stdout),
        colour=terminal.has_colour(sys.stdout),
    )
