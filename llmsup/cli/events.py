"""`llmsup events`: the journal itself, so it works with no daemon."""

import json
from typing import cast

from llmsup.cli import render, terminal
from llmsup.config.paths import paths
from llmsup.control.wire import EventInfo
from llmsup.errors import UsageError
from llmsup.host import logfile

FOLLOW_POLL_S = 0.1


def events(*, lines: int, follow: bool, as_json: bool) -> None:
    """Show the last events; then those that follow."""
    path = paths().events
    if not path.exists():
        raise UsageError("there are no events yet", hint="llmsup start")
    if follow:
        for line in logfile.follow(path, poll_s=FOLLOW_POLL_S, lines=lines):
            _show(line, as_json=as_json)
    else:
        for line in logfile.tail(path, lines):
            _show(line, as_json=as_json)


def _show(line: str, *, as_json: bool) -> None:
    try:
        info = json.loads(line)
    except ValueError:
        return  # cut off by a full disk or a loss of power
    if as_json:
        terminal.show(line)
    elif isinstance(info, dict) and {"time", "event"} <= info.keys():
        terminal.show(render.event(cast("EventInfo", info)))
