"""`llmsup switch`: another model for a service, or another profile, shown while it loads."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmsup.cli import terminal
from llmsup.cli.live import live
from llmsup.cli.wait import on_interrupt
from llmsup.config.paths import paths
from llmsup.config.profiles import SUFFIX
from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.core.switching import Phase
from llmsup.errors import LlmsupError

GOES_ON = "the switch goes on: llmsup events shows what comes of it"
MIB = 2**20

Show = Callable[[SwitchProgress], None]


def switch(target: str, model: str | None, *, as_json: bool) -> None:
    """Have `target` serve `model`, a file, or what its profile says; wait for the end of it.

    Or have the profile `target` served. A file is looked for here, then where the daemon looks.
    Raises LlmsupError where it failed.
    """
    if model is not None:
        model = _found_here(model)
    elif "/" in target or target.endswith(SUFFIX):
        target = _found_here(target)
    with on_interrupt(GOES_ON), _progress() as show:
        result = Client(paths()).switch(target, model, show)
    if as_json:
        terminal.show_json(result)
    elif result["success"]:
        for line in lines(result):
            terminal.show(line)
    if not result["success"]:
        whose = result["service"] or "SERVICE"
        raise LlmsupError(result["message"], hint=f"llmsup why {whose}; llmsup logs {whose}")


def _found_here(file: str) -> str:
    """The absolute path of a file that is here; what is not is looked for by the daemon."""
    here = Path(file).expanduser()
    return str(here.absolute()) if here.is_file() else file


def lines(result: SwitchResult) -> list[str]:
    """A switch that succeeded, for a person."""
    rows = {
        "success": "yes",
        "message": result["message"],
        "current model": result["current_model"] or "-",
        "switch time": f"{result['switch_time_s']:.1f} s",
    }
    return [f"{name:<13}  {value}" for name, value in rows.items()]


def words(progress: SwitchProgress) -> str:
    """How far it is, on one line."""
    parts = [f"{progress.get('profile') or progress['service']}: {progress['phase']}"]
    is_loading = progress["phase"] in {Phase.LOADING.value, Phase.LOADING_BESIDE.value}
    if is_loading and progress["model"]:
        read, size = progress["read_bytes"], progress["size_bytes"]
        parts.append(f"{progress['model']}, {read / MIB:.0f} of {size / MIB:.0f} MiB")
        if progress["last_load_s"] is not None:
            parts.append(f"took {progress['last_load_s']:.1f} s the last time")
    parts.append(f"{progress['elapsed_s']:.1f} s")
    if progress["why"]:
        parts.append(progress["why"])
    return " · ".join(parts)


@contextmanager
def _progress() -> Iterator[Show]:
    """Yields what shows it on stderr: redrawn on a terminal, a line a phase elsewhere."""
    if terminal.is_live(sys.stderr):
        with live(sys.stderr) as draw:
            yield lambda progress: draw(words(progress))
        return
    last = ""

    def say(progress: SwitchProgress) -> None:
        nonlocal last
        if progress["phase"] != last:
            last = progress["phase"]
            terminal.say(words(progress))

    yield say
