"""`llmsup drill`: the scenarios one after another, a line each, and the evidence."""

import asyncio
import fcntl
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmsup.cli import terminal
from llmsup.config.paths import Paths, paths
from llmsup.drill import evidence, run
from llmsup.drill.ground import CLIENTS, Ground
from llmsup.drill.report import Outcome, Report
from llmsup.drill.table import NAMES, SCENARIOS, Scenario
from llmsup.errors import LlmsupError, UsageError

INTERRUPTED = 130
NAME_WIDTH = max(map(len, NAMES))


def drill(names: Sequence[str], *, as_json: bool, out: Path | None) -> int:
    """Run these scenarios, or all that harm nothing here; returns the exit status."""
    chosen = _chosen(names)
    home = paths()
    with _alone(home):
        try:
            return asyncio.run(_drill(home, chosen, bool(names), as_json=as_json, out=out))
        except asyncio.CancelledError:  # by SIGTERM; everything is mended
            return INTERRUPTED


def _chosen(names: Sequence[str]) -> list[Scenario]:
    """The scenarios by name, each once, in the order of the table. Raises UsageError."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UsageError(
            f"unknown scenario: {', '.join(unknown)}", hint=f"one of {', '.join(NAMES)}"
        )
    return [scenario for scenario in SCENARIOS if not names or scenario.name in names]


async def _drill(
    home: Paths, chosen: Sequence[Scenario], named: bool, *, as_json: bool, out: Path | None
) -> int:
    ground = await run.survey(home)
    if named:
        _require_sensible(ground, chosen)
    directory = evidence.folder(home.state / "drills", out)
    _end_as_on_interrupt()
    terminal.say(
        f"drill of {ground.status['daemon']['profile']}: {CLIENTS} clients on {ground.route} "
        f"({', then '.join(ground.services)})"
    )
    reports: list[Report] = []
    interrupted = True
    try:
        for scenario in chosen:
            report = await _one(ground, scenario, named)
            reports.append(report)
            if not as_json:
                terminal.show(_line(report))
        interrupted = False
    finally:
        document = evidence.document(ground, reports, interrupted=interrupted)
        evidence.write(directory, document)
        if as_json:
            terminal.show_json(document)
        words = "interrupted; the stack is as it was; " if interrupted else ""
        terminal.say(f"{words}evidence: {directory}")
    return 0 if evidence.is_passed(reports) else 1


def _require_sensible(ground: Ground, chosen: Sequence[Scenario]) -> None:
    """Raise LlmsupError where a scenario that was named would tell nothing here."""
    for scenario in chosen:
        if why := scenario.why_not(ground):
            raise LlmsupError(f"{scenario.name} tells nothing here: {why}", hint="llmsup drill -h")


async def _one(ground: Ground, scenario: Scenario, named: bool) -> Report:
    why_not = scenario.why_not(ground) or ("" if named else scenario.why_not_unasked(ground))
    if why_not:
        return run.skipped(scenario, why_not)
    return await run.run(ground, scenario)


def _line(report: Report) -> str:
    outcome_width = max(len(each.value) for each in Outcome)
    outcome = f"{report.outcome.value:<{outcome_width}}"
    return f"{report.scenario:<{NAME_WIDTH}}  {outcome}  {report.line}"


@contextmanager
def _alone(home: Paths) -> Iterator[None]:
    """One drill a home at a time. Raises LlmsupError where one is on."""
    home.create()
    path = home.state / "drill.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlmsupError("a drill is on already", hint="wait for its end") from None
        yield
    finally:
        os.close(file)


def _end_as_on_interrupt() -> None:
    """SIGTERM and a closed terminal end a drill as Ctrl-C does: what is broken is mended first."""
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
