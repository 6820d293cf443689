"""A text that is redrawn in place on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llmsup.cli import terminal


@contextmanager
def live(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Yields the function that replaces what is on the screen by another text."""
    console = Console(file=stream, highlight=False)
    with Live(console=console, auto_refresh=False) as view:

        def draw(text: str) -> None:
            console.width = terminal.width(stream) or terminal.WIDTH_UNKNOWN
            shown = Text.from_ansi(text, no_wrap=True, overflow="ellipsis")
            view.update(shown, refresh=True)

        yield draw
