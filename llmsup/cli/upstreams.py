"""`llmsup upstreams`."""

from llmsup.cli import render, terminal
from llmsup.config.paths import paths
from llmsup.control.client import Client


def upstreams(*, as_json: bool) -> None:
    """Show every route's upstream lists."""
    infos = Client(paths()).upstreams()
    if as_json:
        terminal.show_json(infos)
    else:
        terminal.show(render.upstreams(infos))
