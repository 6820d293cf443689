"""`llmsup status`."""

import sys

from llmsup.cli import outcome, render, terminal
from llmsup.config.paths import paths
from llmsup.control.client import Client
from llmsup.errors import NotRunningError

NOT_RUNNING: dict[str, object] = {
    "daemon": None,
    "gpu": None,
    "gpu_why": "",
    "gateway": None,
    "services": [],
    "routes": [],
}


def status(*, as_json: bool) -> int:
    """Show the stack; returns 0 where all that is wanted is ready, 1 where it is degraded."""
    try:
        snapshot = Client(paths()).status()
    except NotRunningError:
        if as_json:
            terminal.show_json(NOT_RUNNING)
        raise
    if as_json:
        terminal.show_json(snapshot)
    else:
        text = render.status(
            snapshot,
            width=terminal.width(sys.stdout),
            colour=terminal.has_colour(sys.stdout),
        )
        terminal.show(text)
    return 1 if outcome.is_degraded(snapshot) else 0
