"""Runs scenarios one after another on one stack, each from a whole stack to a whole stack."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress

from llmsup.config.load import load
from llmsup.config.paths import Paths
from llmsup.control.client import Client as Control
from llmsup.drill.ground import WHOLE_TIMEOUT_S, Ground, environ, unready
from llmsup.drill.report import Outcome, Report, judged
from llmsup.drill.table import Scenario
from llmsup.errors import LlmsupError
from llmsup.host import choices, logfile

EVENTS_MAX = 2000


async def survey(paths: Paths) -> Ground:
    """The stack that is up, with a route to drill: one that has a fallback, else any.

    Raises NotRunningError, and LlmsupError where the stack is not whole or answers no chat request.
    """
    control = Control(paths)
    status = control.status()
    daemon = status["daemon"]
    if troubles := ["it is stopping"] if daemon["stopping"] else unready(status):
        raise LlmsupError(
            f"the stack is not whole: {'; '.join(troubles)}",
            hint="a drill begins once llmsup status exits 0",
        )
    loaded = load(
        daemon["profile_path"],
        environ=environ(daemon["pid"]),
        overrides=daemon["overrides"],
        config_dir=paths.config,
        choices=choices.peek(paths.choices).usable,
    )
    routes = sorted(status["routes"], key=lambda route: len(route["published"]) < 2)
    said = "the profile has no route"
    for route in routes:
        if not route["published"]:
            continue
        ground = Ground(paths, loaded, status, route["route"], tuple(route["published"]), control)
        record = await ground.ask()
        if not record.failed:
            return ground
        said = f"{route['route']} answered {record.status or 'nothing'}: {record.error}"
    raise LlmsupError(
        f"no route answers a chat request: {said}",
        hint="llmsup upstreams shows who is behind each route",
    )


async def run(ground: Ground, scenario: Scenario) -> Report:
    """Break, look, judge. What goes wrong on the way is a failure of the scenario."""
    before = ground.control.status()
    began_time = time.time()
    broken = None
    try:
        broken = await scenario.run(ground)
        outcome, line = judged(broken.findings)
    except (LlmsupError, OSError) as error:
        outcome, line = Outcome.FAILED, str(error)
    if await ground.until_whole(WHOLE_TIMEOUT_S) is None:
        outcome, line = Outcome.FAILED, f"{line} · the stack did not become whole again"
    after = None
    with suppress(LlmsupError):
        after = ground.control.status()
    return Report(
        scenario=scenario.name,
        outcome=outcome,
        line=line,
        began_time=began_time,
        ended_time=time.time(),
        by_hand=scenario.commands(ground),
        broken=broken,
        status_before=before,
        status_after=after,
        events=_events(ground.paths, began_time),
    )


def skipped(scenario: Scenario, why: str) -> Report:
    """A scenario that was not run."""
    now = time.time()
    return Report(scenario.name, Outcome.SKIPPED, why, now, now)


def _events(paths: Paths, since_time: float) -> Sequence[object]:
    """What the journal says since then."""
    found = []
    for line in logfile.tail(paths.events, EVENTS_MAX):
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("time", 0) >= since_time:
                found.append(event)
    return found
