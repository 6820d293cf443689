"""Switches between two real models under eight closed-loop clients on both routes.

Beside it, in the same run: how long llama-server takes to load the same model by itself.
`python -m bench.switching [--switches N] [--way NAME]`
"""

import argparse
import asyncio
import math
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.figures import line, spread, verdict
from bench.models import gemma, smollm2
from bench.plain_server import PlainServer, arguments_of, plain_server
from bench.witness import Turn, faults, question
from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.drill.traffic import Load, Record
from llmsup.host import choices
from tests.e2e.conftest import real_stack
from tests.home import Home

SWITCHES = 20
PLAIN_LOADS = 5
CLIENTS_PER_LOAD = 2
PAUSE_S = 0.02
LIMIT_MS = 300
CONFIRM_MAX_S = 0.5
FIXED_PORT = re.compile(r"^port = .*\n", re.MULTILINE)
ROUTES = {"chat-3b": ("chat", "code"), "code-7b": ("code", "chat")}


@dataclass(frozen=True)
class Target:
    """What is switched to: a service, and another model for it where that is not None."""

    service: str
    model: Path | None = None


@dataclass(frozen=True)
class Way:
    """One way of switching: keys of the profile, and what is switched to in turn.

    `gives_way_first`: what runs ends before the target loads. `falls_back`: the routes of which
    another service answers at times. `holds`: nobody answers while a model loads.
    """

    name: str
    mode: str
    targets: tuple[Target, ...]
    gives_way_first: bool
    falls_back: frozenset[str]
    holds: bool = False

    @property
    def keys(self) -> str:
        """Of the profile, above its tables."""
        mode = {"dual": "", "single": 'mode = "single"\nactive = "chat"\n'}[self.mode]
        return mode + ('switch = "break-first"\n' if self.gives_way_first else "")


def ways() -> tuple[Way, ...]:
    """All of them."""
    models = (Target("chat", gemma()), Target("chat", smollm2()))
    services = (Target("code"), Target("chat"))
    chat, both, none = frozenset({"chat-3b"}), frozenset(ROUTES), frozenset[str]()
    return (
        Way("fallback", "dual", models, gives_way_first=True, falls_back=chat),
        Way("hold", "single", services, gives_way_first=True, falls_back=both, holds=True),
        Way("beside", "dual", models, gives_way_first=False, falls_back=none),
        Way("single-beside", "single", services, gives_way_first=False, falls_back=both),
    )


@dataclass(frozen=True)
class Timing:
    """Where the time of one switch went, in seconds."""

    model: str
    total_s: float
    drain_s: float
    stop_s: float
    spawn_s: float
    load_s: float
    verify_s: float

    @property
    def beyond_s(self) -> float:
        """What it took beyond the load, and beyond the requests in flight."""
        return self.total_s - self.load_s - self.drain_s


@dataclass
class Trial:
    """What was seen of one way."""

    way: Way
    results: list[SwitchResult] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    kept_at: list[float] = field(default_factory=list)
    phases: set[str] = field(default_factory=set)
    timings: list[Timing] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    records: dict[str, list[Record]] = field(default_factory=dict)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    plain: dict[str, list[PlainServer]] = field(default_factory=dict)

    @property
    def all_records(self) -> list[Record]:
        """The requests of both routes."""
        return [record for each in self.records.values() for record in each]

    def note(self, progress: SwitchProgress) -> None:
        """A switch is so far."""
        self.phases.add(progress["phase"])

    def follow(self, events: Sequence[dict[str, Any]]) -> None:
        """Work out from the journal where the time went, and when it was whose turn."""
        told: list[dict[str, Any]] = []
        serving = {"chat": (smollm2().name, -math.inf), "code": (gemma().name, -math.inf)}
        switched = iter(zip(self.results, self.loads_s, self.kept_at, strict=True))
        for event in events:
            told.append(event)
            if event["event"] != "switch":
                continue
            result, load_s, kept_at = next(switched)
            target, model = str(result["service"]), str(result["current_model"])
            self.timings.append(
                _timing(
                    told, target, result, load_s, kept_at, gives_way_first=self.way.gives_way_first
                )
            )
            before, start = serving[target]
            if before != model:
                end = _confirmed_at(events, kept_at)
                self.turns.append(Turn(target, before, start, end))
                serving[target] = (model, kept_at)
            told = []
        for service, (model, start) in serving.items():
            self.turns.append(Turn(service, model, start, math.inf))

    def faults(self) -> list[str]:
        """What is wrong with the answers."""
        return [
            fault
            for route, records in self.records.items()
            for fault in faults(records, ROUTES[route], self.turns, self.prompt_tokens)
        ]


async def run(home: Home, way: Way, switches: int, plain_loads: int = PLAIN_LOADS) -> Trial:
    """Switch so many times under load. Each switch begins once all clients were answered.

    `plain_loads` of each model are made before and as many after it.
    """
    real_stack(home)
    text = home.profile.read_text()
    # A service can only have two servers for a moment where its port may change.
    text = text if way.gives_way_first else FIXED_PORT.sub("", text)
    home.profile.write_text(way.keys + text)
    home.start(timeout_s=90)
    trial = Trial(way)
    argv = arguments_of(home.service("chat")["pid"])
    loads = [
        (route, Load(home.gateway_port, question(route, is_stream=is_stream),
                     clients=CLIENTS_PER_LOAD, pause_s=PAUSE_S))
        for route in ROUTES
        for is_stream in (False, True)
    ]  # fmt: skip

    async def load_alone() -> None:
        await asyncio.to_thread(_load_alone, trial, argv, home.root, plain_loads)

    if way.holds:
        await load_alone()
    for _, load in loads:
        load.start()
    try:
        if not way.holds:
            await load_alone()
        for target in islice(cycle(way.targets), switches):
            await _answered(loads)
            model = None if target.model is None else str(target.model)
            switch = Client(home.paths).switch
            result = await asyncio.to_thread(switch, target.service, model, trial.note)
            trial.results.append(result)
            trial.loads_s.append(_last_load_s(home, result["current_model"]))
            trial.kept_at.append(_written_at(home.paths.choices))
        await _answered(loads)
        if not way.holds:
            await load_alone()
    finally:
        for route, load in loads:
            trial.records.setdefault(route, []).extend(await load.finish())
    if way.holds:
        await load_alone()
    trial.follow(home.events())
    return trial


def _load_alone(trial: Trial, argv: Sequence[str], directory: Path, times: int) -> None:
    """Beside the clients where they are answered while a model loads; else without them."""
    for _ in range(times):
        for model in (smollm2(), gemma()):
            with plain_server(argv, model, directory / "plain.log") as server:
                trial.plain.setdefault(model.name, []).append(server)
                body = question("chat", is_stream=False)
                trial.prompt_tokens[model.name] = server.prompt_tokens(body)


async def _answered(loads: Sequence[tuple[str, Load]]) -> None:
    """Until each client was answered once more."""
    before = [len(load.records) for _, load in loads]
    while any(
        len(load.records) < count + 2 * CLIENTS_PER_LOAD
        for (_, load), count in zip(loads, before, strict=True)
    ):
        await asyncio.sleep(0.01)


def _last_load_s(home: Home, model: str | None) -> float:
    """How long the daemon saw this model load the last time."""
    loads = choices.peek(home.paths.choices).load_s
    return next((took_s for path, took_s in loads.items() if Path(path).name == model), math.nan)


def _timing(
    told: Sequence[dict[str, Any]],
    target: str,
    result: SwitchResult,
    load_s: float,
    kept_at: float,
    *,
    gives_way_first: bool,
) -> Timing:
    """From what was told between the end of the switch before and the end of this one."""
    states = [each for each in told if each["event"] == "state"]
    starting = next(x["at_s"] for x in reversed(states) if _is(x, "starting", target))
    ready = next(x["at_s"] for x in states if _is(x, "ready", target) and x["at_s"] > starting)
    left = [each for each in states if each["at_s"] < starting] if gives_way_first else []
    stopping = next((x["at_s"] for x in reversed(left) if _is(x, "stopping")), starting)
    draining = next((x["at_s"] for x in reversed(left) if _is(x, "draining")), stopping)
    return Timing(
        model=str(result["current_model"]),
        total_s=result["switch_time_s"],
        drain_s=stopping - draining,
        stop_s=starting - stopping,
        spawn_s=ready - load_s - starting,
        load_s=load_s,
        verify_s=kept_at - ready,
    )


def _is(event: dict[str, Any], state: str, service: str | None = None) -> bool:
    return event["state"] == state and service in {None, event["service"]}


def _written_at(path: Path) -> float:
    """When a file was written, as monotonic time; up to a tick of the kernel before it was.

    That of the choices is written once a target has proved itself, before it gets any request.
    """
    return path.stat().st_mtime - time.time() + time.monotonic()


def _confirmed_at(events: Sequence[dict[str, Any]], kept_at: float) -> float:
    """When Envoy was last seen to get a list that was published then."""
    until = kept_at + CONFIRM_MAX_S
    told = [each["at_s"] for each in events if each["event"] == "confirmed"]
    return max((at for at in told if kept_at < at < until), default=kept_at)


def report(trial: Trial) -> bool:
    """Print what was seen; whether it is as it should be."""
    records, timings = trial.all_records, trial.timings
    failed = [record for record in records if record.failed]
    faults = trial.faults()
    unsuccessful = [each["message"] for each in trial.results if not each["success"]]
    print(f"{len(trial.results)} switches, {trial.way.name}")
    fallback = sum(record.is_fallback for record in records)
    line("requests", f"{len(records):8d}, {fallback} of them answered by the fallback")
    line("longest wait of a request", f"{max(r.wait_s for r in records) * 1000:8.1f} ms")
    for model, plain in trial.plain.items():
        mine = [each for each in timings if each.model == model]
        line(model, "")
        line("  switch", spread([each.total_s for each in mine]))
        line("    requests in flight end", spread([each.drain_s for each in mine]))
        line("    the old one ends", spread([each.stop_s for each in mine]))
        line("    until the new one is spawned", spread([each.spawn_s for each in mine]))
        line("    load, as the daemon saw it", spread([each.load_s for each in mine]))
        line("    it proves itself", spread([each.verify_s for each in mine]))
        line("  llama-server by itself: load", spread([each.load_s for each in plain]))
        line("    its end, after SIGTERM", spread([each.end_s for each in plain]))
    for words in (*unsuccessful, *faults)[:5]:
        line("wrong", words)
    beyond_ms = [each.beyond_s * 1000 for each in timings]
    line("beyond load and requests in flight", spread([each.beyond_s for each in timings]))
    return all(
        [
            verdict("failed requests", len(failed), 0, ""),
            verdict("answers of the wrong model", len(faults) - len(failed), 0, ""),
            verdict("switches that failed", len(unsuccessful), 0, ""),
            verdict("beyond the load, median", statistics.median(beyond_ms), LIMIT_MS, "ms"),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--switches", type=int, default=SWITCHES)
    parser.add_argument("--way", choices=[way.name for way in ways()], help="by default all")
    arguments = parser.parse_args()
    holds = True
    for way in ways():
        if arguments.way not in {None, way.name}:
            continue
        home = Home()
        try:
            trial = asyncio.run(run(home, way, arguments.switches))
            holds = report(trial) and holds
        finally:
            home.close()
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
