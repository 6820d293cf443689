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
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.figures import line, spread, verdict
from bench.models import gemma, smollm2
from bench.plain_server import PlainServer, arguments_of, plain_server
from bench.switch_times import Switched, Timing, Told, confirmed_at, timing, written_at
from bench.witness import Turn, faults, question
from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress
from llmsup.drill.traffic import Load, Record
from llmsup.host import choices
from tests.e2e.conftest import real_stack
from tests.home import Home

SWITCHES = 20
PLAIN_LOADS = 5
CLIENTS_PER_LOAD = 2
PAUSE_S = 0.02
LIMIT_MS = 300
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


@dataclass
class Trial:
    """What was seen of one way."""

    way: Way
    switches: list[Switched] = field(default_factory=list)
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

    @property
    def failed(self) -> list[str]:
        """What switches said that did not come about."""
        results = [each.result for each in self.switches]
        return [each["message"] for each in results if not each["success"]]

    def follow(self, events: Told) -> None:
        """Work out from the journal where the time went, and when it was whose turn."""
        first = self.way.gives_way_first
        serving = {"chat": (smollm2().name, -math.inf), "code": (gemma().name, -math.inf)}
        told: list[dict[str, Any]] = []
        switches = iter(self.switches)
        for event in events:
            told.append(event)
            if event["event"] != "switch":
                continue
            switched = next(switches)
            if switched.result["success"]:
                self.timings.append(timing(told, switched, gives_way_first=first))
                before, start = serving[switched.target]
                if before != switched.model:
                    end = confirmed_at(events, switched.chosen_at)
                    self.turns.append(Turn(switched.target, before, start, end))
                    serving[switched.target] = (switched.model, switched.chosen_at)
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
            load_s = _last_load_s(home, result["current_model"])
            trial.switches.append(Switched(result, load_s, written_at(home.paths.choices)))
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


def report(trial: Trial) -> bool:
    """Print what was seen; whether it is as it should be."""
    records, timings = trial.all_records, trial.timings
    failed = [record for record in records if record.failed]
    faults = trial.faults()
    print(f"{len(trial.switches)} switches, {trial.way.name}")
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
    for words in (*trial.failed, *faults)[:5]:
        line("wrong", words)
    beyond_ms = [each.beyond_s * 1000 for each in timings]
    line("beyond load and requests in flight", spread([each.beyond_s for each in timings]))
    return all(
        [
            verdict("failed requests", len(failed), 0, ""),
            verdict("answers of the wrong model", len(faults) - len(failed), 0, ""),
            verdict("switches that failed", len(trial.failed), 0, ""),
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
