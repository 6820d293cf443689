"""The gate to the card: asyncio and threads, with a card and services that are plain values."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from llmsup import card_gate
from llmsup.card_gate import CardGate
from llmsup.core import leases
from llmsup.core.device import Absence, Device, NoDevice, Reading
from llmsup.core.eviction import Decision, Evict, Fits, Wait
from llmsup.core.grant import Grant, written
from llmsup.core.leases import Lease, Standing, rank
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Demand, Knob, Placement, Plan, Price
from llmsup.core.service import Service, State, Want
from llmsup.core.sizes import Estimate, Sizes
from llmsup.errors import Flaw, LlmsupError, ModelFileError, NoRoomError
from llmsup.placing import Placed, Placing

MIB = 2**20
LAYERS = 37
LAYER_MIB = 50
NO_DRIVER = NoDevice(Absence.NO_DRIVER, "the NVIDIA driver is not loaded")


def price(options: Options) -> Price:
    return Price(Estimate(Sizes(options.gpu_layers * LAYER_MIB * MIB), Sizes()), 0)


def plan(budget: Budget | None, demands: Iterable[Demand], no_card: str = "") -> Plan:
    """By rank, layers as they fit; what is fixed is kept free for, and refused where it cannot."""
    ranked = sorted(demands, key=lambda each: rank(each.service, each.priority))
    left = budget.usable_bytes if budget else 0
    fixed = {e.service: price(e.asked).device_bytes for e in ranked if not e.knobs and budget}
    placements, refusal = [], ""
    for each in ranked:
        left -= fixed.get(each.service, 0)
    for each in ranked:
        if each.service in fixed:
            if left < 0:
                refusal = f"{each.service} needs {fixed[each.service] // MIB} MiB"
            layers = each.asked.gpu_layers
        else:
            room = left if each.at_most_bytes is None else min(left, each.at_most_bytes)
            layers = max(0, min(LAYERS, room // (LAYER_MIB * MIB)))
            left -= layers * LAYER_MIB * MIB
        options = replace(each.asked, gpu_layers=layers)
        placements.append(Placement(each.service, "m.gguf", LAYERS, options, price(options), "why"))
    return Plan(tuple(placements), budget, refusal, no_card)


@dataclass
class Sizer:
    fixed: dict[str, int] = field(default_factory=dict)
    priorities: dict[str, int] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    broken: bool = False
    may_answer: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_answer.set()

    def demand(
        self, service: str, at_most_bytes: int | None = None, *, reading: Reading | None = None
    ) -> Demand:
        self.may_answer.wait(20)
        if service in self.unknown:
            raise ModelFileError(Flaw.UNKNOWN, "no such architecture")
        if self.broken:
            raise ZeroDivisionError
        layers = self.fixed.get(service, LAYERS)
        knobs = frozenset[Knob]() if service in self.fixed else frozenset({Knob.GPU_LAYERS})
        return Demand(
            service, "m.gguf", LAYERS, Options(layers), price, lambda _: 0, knobs,
            priority=self.priorities[service], at_most_bytes=at_most_bytes,
        )  # fmt: skip

    def budget(
        self, device: Device, *, reserved_bytes: int = 0, coming_back_bytes: int = 0
    ) -> Budget:
        return Budget("card", device.total_bytes, device.free_bytes, 0, device.total_bytes)


class Stack:
    """Services as a supervisor would have them; what they are given, they take of the card."""

    def __init__(self, **priorities: int) -> None:
        self.services = {name: Service(name) for name in priorities}
        self.sizer = Sizer(priorities=priorities)
        self.reading: Reading = Device(0, "GPU-1", "card", "1", 6000 * MIB, 6000 * MIB, 0)
        self.readings = 0
        self.placed: list[Placed] = []
        self.measured: list[Lease] = []
        self.no_card: list[str] = []
        self.retried: list[str] = []
        self.leaving: tuple[str, ...] = ()
        self.renewed: list[str] = []
        self.on_demand: set[str] = set()
        self.decision: Decision | None = None
        self.evicted: list[tuple[str, tuple[str, ...]]] = []
        self.fitted: list[bool] = []
        self.gate = CardGate(
            self.read,
            Placing(self.sizer, plan),
            {name: rank(name, priority) for name, priority in priorities.items()},
            lambda: self.services,
            eviction=self,
            leaving=lambda: self.leaving,
            renew=self.renewed.extend,
            on_placed=self.placed.append,
            on_measured=self.measured.append,
            on_no_card=self.no_card.append,
            retry=self.retried.append,
        )

    # --- the room that others make

    def may_leave(self, service: str) -> bool:
        return service in self.on_demand

    async def decide(self, service: str, fits: Fits) -> Decision | None:
        self.fitted = [fits(more * MIB) for more in (0, 6000)]
        return self.decision

    def evict(self, services: Sequence[str], service: str) -> None:
        self.evicted.append((service, tuple(services)))
        for name in services:
            self.change(name, want=Want.DOWN, state=State.DRAINING)

    # --- the card

    async def read(self) -> Reading:
        self.readings += 1
        await asyncio.sleep(0)
        return self.reading

    @property
    def free_mib(self) -> int:
        assert isinstance(self.reading, Device)
        return self.reading.free_bytes // MIB

    def take(self, mib: int) -> None:
        assert isinstance(self.reading, Device)
        self.reading = replace(self.reading, free_bytes=self.reading.free_bytes - mib * MIB)

    def change(self, name: str, **changes: object) -> None:
        before = self.services[name]
        after = replace(before, **changes)  # type: ignore[arg-type]
        self.services[name] = after
        self.gate.note_change(before, after)

    def start(self, name: str) -> "asyncio.Future[Grant]":
        generation = self.services[name].generation + 1
        self.change(name, want=Want.UP, state=State.STARTING, generation=generation)
        return self.gate.ask(name, generation)

    def end(self, name: str) -> None:
        self.change(name, want=Want.DOWN, state=State.STOPPED)

    async def load(self, name: str) -> Placement:
        """All the way to held."""
        placement = await placed(self.start(name))
        self.take(placement.price.device_bytes // MIB)
        self.change(name, state=State.READY)
        await until(lambda: self.standing(name) is Standing.HELD)
        return placement

    def standing(self, name: str) -> Standing | None:
        lease = self.gate.lease(name)
        return lease.standing if lease else None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def placed(answer: "asyncio.Future[Grant]") -> Placement:
    async with asyncio.timeout(20):
        grant = await answer
    assert grant.placement is not None
    return grant.placement


def run(test: Callable[[Stack], Awaitable[None]], **priorities: int) -> Stack:
    """Run `test` beside the gate's own task."""

    async def main() -> Stack:
        stack = Stack(**(priorities or {"chat": 10, "code": 0}))
        keeper = asyncio.create_task(stack.gate.keep())
        try:
            await test(stack)
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        return stack

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_gate, "SETTLE_LOOK_S", 0.01)
    monkeypatch.setattr(card_gate, "LOOK_PERIOD_S", 0.01)
    monkeypatch.setattr(card_gate, "READING_RETRY_S", 0.01)
    monkeypatch.setattr(card_gate, "READING_PATIENCE_S", 0.1)


def test_loads_go_in_order_of_rank_one_after_another() -> None:
    async def test(stack: Stack) -> None:
        code, chat = stack.start("code"), stack.start("chat")
        first = await placed(chat)
        assert not code.done()
        assert stack.gate.why("code") == "waits for the card: chat is loading"

        stack.take(1900)
        stack.change("chat", state=State.READY)
        second = await placed(code)

        assert (first.options.gpu_layers, second.options.gpu_layers) == (37, 37)
        lease = stack.gate.lease("chat")
        assert lease is not None
        assert lease.measured_bytes == 1900 * MIB
        assert [each.service for each in stack.measured] == ["chat"]

    run(test)


def test_each_plan_counts_on_what_is_free_just_then() -> None:
    async def test(stack: Stack) -> None:
        assert (await stack.load("chat")).options.gpu_layers == 37
        stack.take(3000)
        assert (await stack.load("code")).options.gpu_layers == (6000 - 1850 - 3000) // LAYER_MIB

    run(test)


def test_room_is_left_for_a_higher_rank_that_is_still_to_come() -> None:
    """Given a service that waits for its dependencies, a lower one does not take its memory."""

    async def test(stack: Stack) -> None:
        stack.take(4000)
        stack.change("chat", want=Want.UP, state=State.STOPPED)
        assert (await placed(stack.start("code"))).options.gpu_layers == 3

    run(test)


def test_no_room_is_left_for_what_has_failed_or_waits_for_what_has() -> None:
    async def test(stack: Stack) -> None:
        stack.take(4000)
        stack.change("chat", want=Want.UP, state=State.STOPPED, missing=("embedding",))
        stack.change("embedding", want=Want.UP, state=State.FAILED)
        assert (await placed(stack.start("code"))).options.gpu_layers == 37

    run(test, embedding=20, chat=10, code=0)


def test_a_listener_that_breaks_keeps_nobody_waiting() -> None:
    async def test(stack: Stack) -> None:
        def broken(_: Placed) -> None:
            raise ZeroDivisionError

        stack.gate._on_placed = broken
        assert (await placed(stack.start("chat"))).options.gpu_layers == 37
        stack.change("chat", state=State.READY)
        await placed(stack.start("code"))

    run(test)


def test_room_is_left_for_what_a_lower_rank_insists_on() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.fixed["code"] = 20
        stack.take(4000)
        code = stack.start("code")
        assert (await placed(stack.start("chat"))).options.gpu_layers == 20
        assert not code.done()

    run(test)


def test_one_that_is_impossible_is_refused_with_the_arithmetic_and_keeps_nobody_waiting() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.fixed["chat"] = 200
        chat, code = stack.start("chat"), stack.start("code")
        with pytest.raises(NoRoomError, match="chat needs 10000 MiB") as refused:
            await chat
        assert refused.value.permanent
        assert (await placed(code)).options.gpu_layers == 37

    run(test)


def test_one_that_was_refused_is_tried_again_once_more_is_free() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.fixed["chat"] = 37
        stack.take(5000)
        with pytest.raises(NoRoomError) as refused:
            await stack.start("chat")
        assert refused.value.shortage
        assert not refused.value.permanent
        stack.change("chat", state=State.FAILED)
        await stack.gate.read()
        assert stack.retried == []

        stack.take(-100)
        await stack.gate.read()
        await stack.gate.read()
        assert stack.retried == ["chat"]

    run(test)


def test_what_is_not_known_is_started_unplanned_and_measured_like_any_other() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.unknown.add("chat")
        chat, code = stack.start("chat"), stack.start("code")
        assert await chat == Grant(None, "GPU-1")
        stack.take(4500)
        stack.change("chat", state=State.READY)
        assert (await placed(code)).options.gpu_layers == 30
        lease = stack.gate.lease("chat")
        assert lease is not None
        assert (lease.planned_bytes, lease.measured_bytes) == (0, 4500 * MIB)

    run(test)


def test_a_service_that_is_stopped_while_it_waits_or_loads_gives_its_turn_back() -> None:
    async def test(stack: Stack) -> None:
        chat, code = stack.start("chat"), stack.start("code")
        await placed(chat)
        stack.end("code")
        assert stack.standing("code") is None
        stack.change("chat", state=State.STOPPING)
        stack.end("chat")
        await placed(stack.start("code"))
        assert not code.done()

    run(test)


def test_a_service_that_is_stopped_while_it_is_planned_for_is_not_placed() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.may_answer.clear()
        chat = stack.start("chat")
        await until(lambda: stack.standing("chat") is Standing.LOADING)
        stack.end("chat")
        stack.sizer.may_answer.set()
        assert (await placed(stack.start("code"))).options.gpu_layers == 37
        assert not chat.done()
        assert stack.standing("chat") is None

    run(test)


def test_memory_of_what_was_stopped_is_waited_for() -> None:
    async def test(stack: Stack) -> None:
        stack.take(4000)
        await stack.load("chat")
        stack.change("chat", want=Want.DOWN, state=State.STOPPING)
        stack.end("chat")
        code = stack.start("code")
        await until(lambda: stack.readings > 20)
        assert not code.done()
        assert stack.gate.why("code") == "waits for 1850 MiB to come back from chat"

        stack.take(-1850)
        assert (await placed(code)).options.gpu_layers == 37

    run(test)


def test_running_out_of_memory_makes_the_next_plans_smaller_and_the_third_is_off_the_card() -> None:
    async def test(stack: Stack) -> None:
        given = []
        for _ in range(4):
            placement = await placed(stack.start("chat"))
            given.append(placement.options.gpu_layers)
            _words, is_remedied = stack.gate.note_out_of_memory("chat", [])
            assert is_remedied == (placement.options.gpu_layers > 0)
        assert given == [37, 35, 26, 0]
        assert [each.ran_out for each in stack.placed] == [False, True, True, True]

    run(test)


def test_a_fixed_service_that_ran_out_has_no_smaller_plan() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.fixed["chat"] = 20
        await placed(stack.start("chat"))
        words, is_remedied = stack.gate.note_out_of_memory("chat", [])
        assert not is_remedied
        assert words == (
            "it had 20 of 37 layers, 1000 MiB planned of 6000 MiB free, "
            "and its profile allows no smaller plan"
        )

    run(test)


def test_more_room_than_there_was_forgets_that_it_ran_out() -> None:
    async def test(stack: Stack) -> None:
        stack.take(5000)
        assert (await placed(stack.start("chat"))).options.gpu_layers == 20
        stack.gate.note_out_of_memory("chat", [])
        stack.take(-1000)
        assert (await placed(stack.start("chat"))).options.gpu_layers == 37

    run(test)


def test_without_a_card_all_are_started_at_once_and_it_is_said_once() -> None:
    async def test(stack: Stack) -> None:
        stack.reading = NO_DRIVER
        answers = [stack.start("chat"), stack.start("code")]
        layers = [(await placed(answer)).options.gpu_layers for answer in answers]
        assert layers == [0, 0]
        assert stack.no_card == [NO_DRIVER.reason]

    run(test)


def test_a_driver_that_fails_just_now_is_waited_for_and_then_the_last_reading_counts() -> None:
    async def test(stack: Stack) -> None:
        stack.take(4500)
        await stack.load("chat")
        stack.reading = NoDevice(Absence.ERROR, "NVML fails")
        code = await placed(stack.start("code"))
        assert code.options.gpu_layers == 0
        assert stack.no_card == []
        assert stack.standing("chat") is Standing.HELD

    run(test)


def test_an_adopted_process_is_waited_for_before_anybody_loads() -> None:
    async def test(stack: Stack) -> None:
        stack.change("chat", want=Want.UP, state=State.STARTING, generation=4)
        placement = Placement("chat", "m.gguf", LAYERS, Options(12), price(Options(12)), "")
        stack.gate.adopt("chat", 4, Grant(placement, "GPU-1"), 700 * MIB)
        code = stack.start("code")
        await asyncio.sleep(0.05)
        assert not code.done()

        stack.change("chat", state=State.READY)
        await placed(code)
        lease = stack.gate.lease("chat")
        assert lease is not None
        assert (lease.planned_bytes, lease.measured_bytes) == (600 * MIB, 700 * MIB)

    run(test)


def test_a_process_that_is_not_adopted_after_all_leaves_no_lease() -> None:
    async def test(stack: Stack) -> None:
        stack.gate.adopt("chat", 4, Grant(), None)
        assert stack.standing("chat") is None

    run(test)


def test_a_bug_in_planning_is_told_and_the_gate_goes_on() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.broken = True
        chat, code = stack.start("chat"), stack.start("code")
        for answer in (chat, code):
            with pytest.raises(LlmsupError, match="no plan could be made: ZeroDivisionError"):
                await answer
        stack.sizer.broken = False
        stack.change("chat", state=State.BACKOFF)
        await placed(stack.start("chat"))

    run(test)


def test_a_card_that_never_comes_to_rest_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(card_gate, "SETTLE_TIMEOUT_S", 0.2)

    async def test(stack: Stack) -> None:
        chat, code = stack.start("chat"), stack.start("code")
        await placed(chat)
        read = stack.read

        async def restless(noise: list[int]) -> Reading:
            stack.take(noise[0])
            noise[0] = -noise[0]
            return await read()

        stack.gate._read = partial(restless, [50])
        stack.change("chat", state=State.READY)
        await placed(code)
        assert stack.measured == []

    run(test)


def test_what_has_loaded_since_the_last_reading_is_not_given_away_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given a driver that fails from the first load on."""
    monkeypatch.setattr(leases, "RETURN_TIMEOUT_S", 0.2)

    async def test(stack: Stack) -> None:
        stack.take(4000)
        chat = await placed(stack.start("chat"))
        assert chat.options.gpu_layers == 37
        stack.reading = NoDevice(Absence.ERROR, "NVML fails")
        stack.change("chat", state=State.READY)
        assert (await placed(stack.start("code"))).options.gpu_layers == 3

        stack.end("chat")
        stack.end("code")
        assert (await placed(stack.start("chat"))).options.gpu_layers == 37

    run(test)


def test_nothing_is_measured_against_a_reading_that_was_old_when_a_load_began() -> None:
    async def test(stack: Stack) -> None:
        await stack.gate.read()
        there = stack.reading
        stack.reading = NoDevice(Absence.ERROR, "NVML fails")
        chat = await placed(stack.start("chat"))
        stack.reading = there
        stack.take(chat.price.device_bytes // MIB + 900)
        stack.change("chat", state=State.READY)
        await until(lambda: stack.standing("chat") is Standing.HELD)
        lease = stack.gate.lease("chat")
        assert lease is not None
        assert lease.measured_bytes is None

    run(test)


def test_a_higher_rank_that_is_still_to_come_keeps_its_room_though_both_do_not_fit() -> None:
    """Given fixed numbers of layers, as the plan of all has it: the lower rank is refused."""

    async def test(stack: Stack) -> None:
        stack.sizer.fixed |= {"chat": 37, "code": 37}
        stack.take(3000)
        stack.change("chat", want=Want.UP, state=State.STOPPED)
        with pytest.raises(NoRoomError, match="code needs 1850 MiB") as refused:
            await stack.start("code")
        assert refused.value.shortage
        assert not refused.value.permanent
        stack.change("code", state=State.FAILED)
        assert (await placed(stack.start("chat"))).options.gpu_layers == 37

    run(test)


def test_a_higher_rank_that_does_not_fit_in_any_case_keeps_nobody_out() -> None:
    async def test(stack: Stack) -> None:
        stack.sizer.fixed |= {"chat": 100, "code": 37}
        stack.take(3000)
        stack.change("chat", want=Want.UP, state=State.STOPPED)
        assert (await placed(stack.start("code"))).options.gpu_layers == 37

    run(test)


@pytest.mark.parametrize(
    "embedding",
    [{"want": Want.UP, "missing": ("rag",)}, {"want": Want.DOWN}],
    ids=["waits for what has failed", "was stopped"],
)
def test_no_room_is_left_for_what_needs_what_will_not_come(embedding: dict[str, object]) -> None:
    async def test(stack: Stack) -> None:
        stack.take(4000)
        stack.change("rag", want=Want.UP, state=State.FAILED)
        stack.change("embedding", state=State.STOPPED, **embedding)
        stack.change("chat", want=Want.UP, state=State.STOPPED, missing=("embedding",))
        assert (await placed(stack.start("code"))).options.gpu_layers == 37

    run(test, rag=30, embedding=20, chat=10, code=0)


def test_a_bound_of_the_next_plan_ends_with_a_stop() -> None:
    """Given a service that was to be restarted smaller, and is stopped before."""

    async def test(stack: Stack) -> None:
        await stack.load("chat")
        stack.gate.bound_next("chat", 500 * MIB)
        stack.end("chat")
        stack.take(-1850)
        assert (await placed(stack.start("chat"))).options.gpu_layers == 37

    run(test)


def test_a_load_during_which_others_freed_as_much_is_not_believed_to_have_taken_nothing() -> None:
    async def test(stack: Stack) -> None:
        stack.take(3000)
        chat = await placed(stack.start("chat"))
        stack.take(chat.price.device_bytes // MIB - 2500)
        stack.change("chat", state=State.READY)
        await until(lambda: stack.standing("chat") is Standing.HELD)
        lease = stack.gate.lease("chat")
        assert lease is not None
        assert lease.bytes == chat.price.device_bytes
        assert stack.measured == []

    run(test)


def test_an_adopted_process_off_the_card_has_no_turn() -> None:
    async def test(stack: Stack) -> None:
        stack.change("chat", want=Want.UP, state=State.STARTING, generation=4)
        off = Placement("chat", "m.gguf", LAYERS, Options(0), price(Options(0)), "")
        stack.gate.adopt("chat", 4, Grant(off, "GPU-1"), None)
        assert (await placed(stack.start("code"))).options.gpu_layers == 37

    run(test)


def test_a_card_that_the_profile_names_and_is_not_there_leaves_others_alone() -> None:
    """Given a number of layers that is fixed: it must not go to another card."""

    async def test(stack: Stack) -> None:
        stack.sizer.fixed["chat"] = 37
        stack.reading = NoDevice(Absence.NO_DEVICE, "there is no card GPU-9, only GPU-1")
        assert (await stack.start("chat")).device == ""

    run(test)


def test_what_an_earlier_daemon_left_is_waited_for_until_it_has_ended() -> None:
    async def test(stack: Stack) -> None:
        stack.take(5000)
        stack.leaving = ("old",)
        chat = stack.start("chat")
        await asyncio.sleep(0.05)
        assert not chat.done()
        assert stack.gate.why("chat") == "waits for old to end"

        stack.leaving = ()
        stack.take(-5000)
        assert (await placed(chat)).options.gpu_layers == 37

    run(test)


def test_a_load_that_is_not_measured_ends_a_row_of_running_out_as_well() -> None:
    async def test(stack: Stack) -> None:
        await placed(stack.start("chat"))
        stack.gate.note_out_of_memory("chat", [])
        stack.reading = NoDevice(Absence.ERROR, "NVML fails")
        given = await stack.start("chat")
        assert given.shrunk is not None
        stack.change("chat", state=State.READY)
        assert stack.gate._placing.ran_out("chat") is False

    run(test)


def test_a_bound_comes_back_with_the_process_that_lives_within_it() -> None:
    """Given another daemon, and a process that was started after it ran out of memory."""

    async def test(stack: Stack) -> None:
        await placed(stack.start("chat"))
        stack.gate.note_out_of_memory("chat", [])
        given = await stack.start("chat")
        assert given.placement is not None

        later = Placing(stack.sizer, plan)
        recalled, is_current = later.recall("chat", written(given), None)
        assert is_current
        assert recalled.shrunk == given.shrunk
        again = later.place("chat", (), stack.reading)
        assert again is not None
        assert again.options == given.placement.options

    run(test)


def test_what_was_placed_without_a_card_is_renewed_once_when_there_is_one() -> None:
    """Given a driver that is loaded after the daemon began, and one that is being stopped then."""

    async def test(stack: Stack) -> None:
        there, stack.reading = stack.reading, NO_DRIVER
        await placed(stack.start("chat"))
        await placed(stack.start("code"))
        stack.change("code", want=Want.DOWN, state=State.STOPPING)
        await stack.gate.read()
        assert stack.renewed == []

        stack.reading = there
        await stack.gate.read()
        await stack.gate.read()
        assert stack.renewed == ["chat"]

    run(test)


# --- room that others make


async def large_beside(stack: Stack, name: str) -> "asyncio.Future[Grant]":
    """`name` asks for more than is free since chat has loaded."""
    stack.on_demand = set(stack.services)
    stack.sizer.fixed |= {"chat": 60, "code": 70, "rag": 80}
    await stack.load("chat")
    return stack.start(name)


def test_one_that_finds_no_room_is_placed_once_others_have_left() -> None:
    """It comes before all others then, whatever their rank: they left for it."""

    async def test(stack: Stack) -> None:
        stack.decision = Evict(("chat",))
        code = await large_beside(stack, "code")
        await until(lambda: stack.standing("code") is Standing.WAITING and bool(stack.evicted))
        assert stack.evicted == [("code", ("chat",))]
        assert stack.fitted == [False, True]
        assert stack.gate.why("code") == "waits for chat to make room"
        rag = stack.start("rag")
        await asyncio.sleep(0.05)
        assert not code.done()
        assert not rag.done(), "what chat leaves is nobody else's"

        stack.change("chat", state=State.STOPPING)
        stack.take(-60 * LAYER_MIB)
        stack.end("chat")
        assert (await placed(code)).options.gpu_layers == 70
        assert not rag.done()

    run(test, chat=10, code=0, rag=5)


def test_while_one_waits_for_its_turn_others_load_that_find_room() -> None:
    async def test(stack: Stack) -> None:
        loop = asyncio.get_running_loop()
        stack.decision = Wait(loop.time() + 3600, ("chat",))
        code = await large_beside(stack, "code")
        await until(lambda: stack.gate.why("code").startswith("waits for room"))
        stack.sizer.fixed["rag"] = 1
        await stack.load("rag")
        readings = stack.readings
        await asyncio.sleep(0.1)
        assert stack.readings == readings, "the card is not read for one that has to wait"
        assert not code.done()

        stack.take(-60 * LAYER_MIB)
        stack.end("chat")  # by itself
        assert (await placed(code)).options.gpu_layers == 70

    run(test, chat=10, code=0, rag=5)


def test_one_that_nobody_can_make_room_for_is_refused() -> None:
    async def test(stack: Stack) -> None:
        code = await large_beside(stack, "code")
        with pytest.raises(NoRoomError):
            await code
        assert stack.evicted == []

    run(test)


def test_one_that_is_stopped_while_others_leave_for_it_leaves_the_room_to_the_next() -> None:
    async def test(stack: Stack) -> None:
        stack.decision = Evict(("chat",))
        await large_beside(stack, "code")
        await until(lambda: bool(stack.evicted))
        rag = stack.start("rag")
        stack.end("code")
        stack.change("chat", state=State.STOPPING)
        stack.take(-60 * LAYER_MIB)
        stack.end("chat")
        assert (await placed(rag)).options.gpu_layers == 80

    run(test, chat=10, code=0, rag=5)


def test_nothing_is_kept_for_one_that_would_leave_again() -> None:
    """chat is wanted, has the higher rank, and has not asked yet."""

    async def test(stack: Stack) -> None:
        stack.on_demand = {"chat", "code"}
        stack.sizer.fixed |= {"chat": 60, "code": 70}
        stack.change("chat", want=Want.UP, state=State.BACKOFF)
        code = stack.start("code")
        assert (await placed(code)).options.gpu_layers == 70

    run(test)
