"""Readings become restarts: the card, the gate and the services are plain values here."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path

import pytest

from llmsup import card_watch, rebalancing
from llmsup.card_gate import CardGate
from llmsup.card_watch import CardWatch
from llmsup.config.schema import Rebalance
from llmsup.core import rebalance
from llmsup.core.device import Absence, Device, NoDevice, Reading
from llmsup.core.leases import Standing, rank
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Demand, Knob, Placement, Plan, Price
from llmsup.core.routing import Route
from llmsup.core.service import Service, State, Want
from llmsup.core.sizes import Estimate, Sizes
from llmsup.host.clocks import read_clocks
from llmsup.host.journal import Journal
from llmsup.placing import Placing
from llmsup.rebalancing import Rebalancing
from llmsup.troubles import Troubles

MIB = 2**20
LAYERS = 40
LAYER_MIB = 50
TOTAL_MIB = 3000
HEADROOM_MIB = 200
PRIORITIES = {"chat": 10, "code": 5}


def price(options: Options) -> Price:
    return Price(Estimate(Sizes(options.gpu_layers * LAYER_MIB * MIB), Sizes()), 0)


def plan(budget: Budget | None, demands: Iterable[Demand], no_card: str = "") -> Plan:
    left = budget.usable_bytes if budget else 0
    placements = []
    for each in sorted(demands, key=lambda each: -each.priority):
        room = left if each.at_most_bytes is None else min(left, each.at_most_bytes)
        layers = min(LAYERS, room // (LAYER_MIB * MIB)) if each.knobs else each.asked.gpu_layers
        options = replace(each.asked, gpu_layers=layers)
        left -= price(options).device_bytes
        placements.append(Placement(each.service, "m.gguf", LAYERS, options, price(options), "why"))
    return Plan(tuple(placements), budget, "", no_card)


@dataclass
class Sizer:
    fixed: frozenset[str] = frozenset()

    def demand(
        self, service: str, at_most_bytes: int | None = None, *, reading: Reading | None = None
    ) -> Demand:
        knobs = frozenset[Knob]() if service in self.fixed else frozenset({Knob.GPU_LAYERS})
        return Demand(
            service, "m.gguf", LAYERS, Options(LAYERS), price, lambda _: 0, knobs,
            priority=PRIORITIES[service], at_most_bytes=at_most_bytes,
        )  # fmt: skip

    def budget(
        self, device: Device, *, reserved_bytes: int = 0, coming_back_bytes: int = 0
    ) -> Budget:
        total = device.total_bytes
        return Budget("card", total, device.free_bytes, HEADROOM_MIB * MIB, total)


@dataclass
class World:
    """Chat with 40 of its 50 MiB layers and code with 16, and a restart that takes no time."""

    directory: Path
    mode: Rebalance
    fixed: frozenset[str] = frozenset()
    routes: tuple[Route, ...] = (
        Route("chat", ("chat", "code")), Route("code", ("code", "chat"))
    )  # fmt: skip
    outside_mib: int = 0
    absent: NoDevice | None = None
    requests: dict[str, int] = field(default_factory=dict)
    restarts: list[str] = field(default_factory=list)
    is_rolling: bool = False

    def __post_init__(self) -> None:
        self.services = {name: Service(name) for name in PRIORITIES}
        self.troubles = Troubles()
        self.journal = self.directory / "events"
        self.sizer = Sizer(self.fixed)
        self.gate = CardGate(
            self.read,
            Placing(self.sizer, plan),
            {name: rank(name, priority) for name, priority in PRIORITIES.items()},
            lambda: self.services,
        )
        self.card = CardWatch(self.gate.read, read_clocks, lambda _: None)
        self.rebalancing = Rebalancing(
            self.mode,
            self.card,
            self.gate,
            sizer=self.sizer,
            users=tuple(PRIORITIES),
            routes=self.routes,
            services=lambda: self.services,
            in_flight=self.in_flight,
            is_busy=lambda: self.is_rolling,
            restart=self.restart,
            journal=Journal(self.journal, self.troubles),
            troubles=self.troubles,
        )

    @property
    def free_mib(self) -> int:
        taken = sum(
            each.planned_bytes // MIB
            for each in self.gate.leases.table.values()
            if each.standing in {Standing.SETTLING, Standing.HELD}
        )
        return max(0, TOTAL_MIB - self.outside_mib - taken)

    async def read(self) -> Reading:
        await asyncio.sleep(0)
        free = self.free_mib * MIB
        return self.absent or Device(0, "GPU-1", "card", "1", TOTAL_MIB * MIB, free, 0)

    async def in_flight(self, service: str, routes: Collection[str]) -> int:
        assert routes
        return self.requests.get(service, 0)

    def change(self, name: str, **changes: object) -> None:
        before = self.services[name]
        self.services[name] = replace(before, **changes)  # type: ignore[arg-type]
        self.gate.note_change(before, self.services[name])

    def restart(self, name: str) -> None:
        self.restarts.append(name)
        self.change(name, state=State.STOPPING)
        self.change(name, state=State.STOPPED)
        asyncio.get_running_loop().create_task(self.load(name))

    async def load(self, name: str) -> None:
        generation = self.services[name].generation + 1
        self.change(name, want=Want.UP, state=State.STARTING, generation=generation)
        await self.gate.ask(name, generation)
        self.change(name, state=State.READY)

    def layers(self, name: str) -> int | None:
        lease = self.gate.lease(name)
        if lease is None or lease.placement is None or lease.standing is not Standing.HELD:
            return None
        return lease.placement.options.gpu_layers

    def is_held(self, name: str) -> bool:
        return self.layers(name) is not None

    def events(self) -> str:
        return self.journal.read_text() if self.journal.exists() else ""


@asynccontextmanager
async def kept(world: World) -> AsyncIterator[World]:
    tasks = [
        asyncio.create_task(each)
        for each in (world.gate.keep(), world.card.keep(), world.rebalancing.keep())
    ]
    try:
        for name in PRIORITIES:
            await world.load(name)
            await until(partial(world.is_held, name))
        yield world
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def readings(world: World, number: int) -> None:
    for _ in range(number):
        await world.card.next_reading()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_watch, "PERIOD_S", 0.01)
    monkeypatch.setattr(rebalancing, "WATCH_CLOSELY_S", 0.01)
    monkeypatch.setattr("llmsup.card_gate.SETTLE_LOOK_S", 0.01)
    monkeypatch.setattr("llmsup.core.leases.RETURN_BLIND_S", 0.05)
    monkeypatch.setattr("llmsup.core.leases.RETURN_TIMEOUT_S", 0.1)
    for name in ("PRESSURE_S", "SQUEEZE_S", "ROOM_S"):
        monkeypatch.setattr(rebalance, name, 0.05)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setattr(rebalance, "FIRST_WAIT_S", 0.1)
    return lambda mode="auto", **changes: World(tmp_path, mode, **changes)


Make = Callable[..., World]


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        async def main() -> None:
            async with asyncio.timeout(60):
                await test(*args, **kwargs)

        asyncio.run(main())

    return run


@in_loop
async def test_code_gives_back_what_other_programs_take_and_grows_again(make: Make) -> None:
    async with kept(make()) as world:
        assert (world.layers("chat"), world.layers("code")) == (40, 16)
        world.outside_mib = 400
        await until(lambda: world.rebalancing.why("code") != "")
        assert world.restarts == ["code"]
        assert world.layers("code") == 8
        assert world.rebalancing.why("code") == (
            "16 → 8 layers on the card: other programs left 0 MiB of the card free, "
            "200 MiB should be"
        )
        assert '"layers_before":16,"layers_after":8' in world.events()

        world.outside_mib = 0
        await until(lambda: world.layers("code") == 16)
        assert world.restarts == ["code", "code"]
        await until(lambda: "8 → 16" in world.rebalancing.why("code"))


@in_loop
async def test_only_code_changes_and_chat_only_once_code_has_nothing_left(make: Make) -> None:
    async with kept(make("shrink")) as world:
        world.outside_mib = 1000
        await until(lambda: world.layers("chat") not in {40, None})
        await until(lambda: world.free_mib >= HEADROOM_MIB)
        assert world.layers("code") == 0
        assert world.restarts[0] == "code"


@in_loop
async def test_a_bound_is_for_one_plan(make: Make) -> None:
    async with kept(make("shrink")) as world:
        world.outside_mib = 400
        await until(lambda: world.layers("code") == 8)
        world.outside_mib = 0
        world.restart("code")
        await until(lambda: world.layers("code") == 16)


@in_loop
async def test_a_fixed_number_of_layers_is_not_touched_and_the_pressure_is_a_trouble(
    make: Make,
) -> None:
    async with kept(make(fixed=frozenset({"chat"}))) as world:
        world.sizer.fixed = frozenset({"chat", "code"})
        world.outside_mib = 400
        await until(lambda: world.troubles.sentences != [])
        assert "no service has layers that it may give back" in world.troubles.sentences[0]
        assert world.events().count("rebalance") == 1
        world.outside_mib = 0
        await until(lambda: world.troubles.sentences == [])
        assert world.restarts == []


@in_loop
async def test_off_only_tells(make: Make) -> None:
    async with kept(make("off")) as world:
        world.outside_mib = 400
        await until(lambda: world.troubles.sentences != [])
        await readings(world, 30)
        assert world.restarts == []


@in_loop
async def test_a_service_that_is_in_use_is_let_be_until_another_answers_its_route(
    make: Make,
) -> None:
    alone = (Route("chat", ("chat",)), Route("code", ("code",)))
    async with kept(make(routes=alone, requests={"code": 1})) as world:
        world.outside_mib = 150
        await readings(world, 40)
        assert world.restarts == []
        world.requests["code"] = 0
        await until(lambda: world.restarts == ["code"])


@in_loop
async def test_nothing_is_done_while_a_restart_goes_on(make: Make) -> None:
    async with kept(make()) as world:
        world.is_rolling = True
        world.outside_mib = 400
        await readings(world, 40)
        assert world.restarts == []
        world.is_rolling = False
        await until(lambda: world.restarts == ["code"])


@in_loop
async def test_nobody_grows_into_what_a_service_that_is_yet_to_come_will_need(make: Make) -> None:
    async with kept(make()) as world:
        world.outside_mib = 400
        await until(lambda: world.layers("code") == 8)
        world.services["chat"] = replace(world.services["chat"], state=State.UNREADY)
        world.outside_mib = 0
        await readings(world, 60)
        assert world.restarts == ["code"]
        world.services["chat"] = replace(world.services["chat"], state=State.READY)
        await until(lambda: world.layers("code") == 16)


@in_loop
async def test_a_card_that_is_lost_says_nothing(make: Make) -> None:
    async with kept(make()) as world:
        world.outside_mib = 400
        world.absent = NoDevice(Absence.LOST, "the card is lost")
        await readings(world, 40)
        assert world.restarts == []
        assert world.troubles.sentences == []


@in_loop
async def test_a_look_that_breaks_is_not_the_last_one(make: Make) -> None:
    async with kept(make(routes=(Route("code", ("code",)),))) as world:
        in_flight, broken = world.in_flight, asyncio.Event()

        async def break_once(service: str, routes: Collection[str]) -> int:
            if not broken.is_set():
                broken.set()
                raise ZeroDivisionError
            return await in_flight(service, routes)

        world.rebalancing._in_flight = break_once
        world.outside_mib = 400
        await until(lambda: world.restarts == ["code"])
        assert broken.is_set()
