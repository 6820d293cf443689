"""When services give layers back to other programs, and when they grow again."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.schema import Rebalance
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Demand, Knob, Price
from llmsup.core.rebalance import (
    FIRST_WAIT_S,
    MIB,
    Action,
    Balance,
    Extent,
    Grow,
    Observation,
    Shrink,
    TellPressure,
    TellRelief,
    Tenant,
    extent,
    growing,
    step,
)

TOTAL = 6141 * MIB
HEADROOM = 256 * MIB
PERIOD_S = 5.0
LOAD_S = 20.0


@dataclass
class Model:
    """A service of the world below."""

    name: str
    rank: int
    all_layers: int = 30
    layer_bytes: int = 60 * MIB
    may_change: bool = True
    may_pause: bool = True
    layers: int = 0

    @property
    def held_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def extent(self, layers: int) -> Extent:
        return Extent(layers, layers == self.all_layers)

    def fitting(self, free_bytes: int) -> int:
        return max(0, min(self.all_layers, free_bytes // self.layer_bytes))


@dataclass
class World:
    """A card with some models on it and other programs that take what they like.

    A change takes `LOAD_S`; then the service has what fits, and not more than it was let have.
    """

    models: list[Model]
    rebalance: Rebalance = "auto"
    outside: int = 0
    now: float = 1000.0
    busy_until: float = 0.0
    actions: list[tuple[float, Action]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.balance = Balance(self.rebalance)
        for model in sorted(self.models, key=lambda each: -each.rank):
            model.layers = model.fitting(self.free - HEADROOM)

    @property
    def free(self) -> int:
        return max(0, TOTAL - self.outside - sum(each.held_bytes for each in self.models))

    def observation(self) -> Observation:
        return Observation(
            Budget("card", TOTAL, self.free, HEADROOM, TOTAL),
            tuple(
                Tenant(
                    each.name,
                    each.extent(each.layers),
                    each.held_bytes,
                    each.may_change,
                    each.may_pause,
                )
                for each in sorted(self.models, key=lambda each: -each.rank)
            ),
            is_settled=self.now >= self.busy_until,
        )

    def look(self, seconds: float = PERIOD_S) -> list[Action]:
        """All that is done within so many seconds, looking every five."""
        seen: list[Action] = []
        until = self.now + seconds
        while self.now < until:
            self.now += PERIOD_S
            found = self.observation()
            names = {each.service for each in growing(self.balance, found, self.now)}
            tenants = tuple(
                replace(each, possible=self._possible(each)) if each.service in names else each
                for each in found.tenants
            )
            self.balance, actions = step(self.balance, replace(found, tenants=tenants), self.now)
            for action in actions:
                self._carry_out(action)
            self.actions += [(self.now, action) for action in actions]
            seen += actions
        return seen

    def take(self, size_mib: int) -> None:
        self.outside += size_mib * MIB

    def _possible(self, tenant: Tenant) -> Extent:
        model = self._model(tenant.service)
        return model.extent(model.fitting(self._free_without(model) - HEADROOM))

    def _free_without(self, model: Model) -> int:
        others = sum(each.held_bytes for each in self.models if each is not model)
        return max(0, TOTAL - self.outside - others)

    def _model(self, name: str) -> Model:
        return next(each for each in self.models if each.name == name)

    def _carry_out(self, action: Action) -> None:
        if not isinstance(action, Shrink | Grow):
            return
        model = self._model(action.service)
        free = self._free_without(model) - HEADROOM
        if isinstance(action, Shrink):
            free = min(free, model.held_bytes - action.by_bytes)
        model.layers = model.fitting(free)
        self.busy_until = self.now + LOAD_S


def dual(rebalance: Rebalance = "auto") -> World:
    """Chat all on the card, and code as far as it fits: 1800 of 1800 and 3660 of 5400 MiB."""
    return World([Model("chat", 2), Model("code", 1, all_layers=90)], rebalance)


def layers(world: World) -> dict[str, int]:
    return {each.name: each.layers for each in world.models}


def test_the_lowest_gives_what_is_missing_once_it_lasts() -> None:
    world = dual()
    world.take(500)

    assert world.look(5) == []
    (action,) = world.look(10)
    assert isinstance(action, Shrink)
    assert action.service == "code"
    assert action.by_bytes >= 500 * MIB - 256 * MIB
    assert world.free >= HEADROOM
    assert world.look(600) == []


def test_a_dip_that_passes_is_nothing() -> None:
    world = dual()
    for _ in range(50):
        world.take(150)
        assert world.look(5) == []
        world.take(-150)
        assert world.look(10) == []


def test_a_drift_that_the_headroom_is_there_for_is_nothing() -> None:
    world = dual()
    world.take(100)

    assert world.look(3600) == []


def test_a_squeeze_acts_sooner_than_a_pressure() -> None:
    def first_after_s(size_mib: int) -> float:
        world = dual()
        world.take(size_mib)
        while not world.look():
            pass
        return world.now - 1000.0

    assert first_after_s(280) < first_after_s(160)


def test_nobody_is_chosen_while_something_loads() -> None:
    world = dual()
    world.take(500)
    world.busy_until = world.now + 300

    assert world.look(295) == []
    assert [type(each) for each in world.look(30)] == [Shrink]


def test_pressure_waits_for_a_service_that_is_busy_and_a_squeeze_does_not() -> None:
    world = dual()
    world.models[1].may_pause = False
    world.take(180)
    assert world.look(600) == []
    world.take(320)
    assert [type(each) for each in world.look(60)] == [Shrink]


def test_one_after_another_and_the_highest_rank_last() -> None:
    world = dual("shrink")
    world.take(5000)

    asked = [each.service for each in world.look(300) if isinstance(each, Shrink)]
    assert asked == ["code", "chat"]
    assert layers(world)["code"] == 0
    assert world.free >= HEADROOM


def test_what_is_asked_again_soon_gives_half() -> None:
    """Given a program that takes a little more each time, there is not a restart for each."""
    world = dual("shrink")
    for _ in range(25):
        world.take(200)
        world.look(60)

    shrunk = [each.service for _, each in world.actions if isinstance(each, Shrink)]
    assert 2 <= shrunk.count("code") <= 8
    assert world.free >= HEADROOM // 2


def test_pinned_services_keep_theirs_and_the_pressure_is_said_once() -> None:
    world = dual()
    for model in world.models:
        model.may_change = False
    world.take(800)

    (action,) = world.look(3600)
    assert isinstance(action, TellPressure)
    world.take(-800)
    assert world.look(60) == [TellRelief()]


def test_off_only_tells() -> None:
    world = dual("off")
    world.take(2000)

    assert world.look(3600) == [TellPressure('rebalance is "off"')]


def test_shrink_never_grows() -> None:
    world = dual("shrink")
    world.take(2000)
    world.look(60)
    world.take(-2000)

    assert world.look(7200) == []


def test_auto_grows_back_once_there_has_been_room_for_a_while() -> None:
    world = dual()
    at_first = layers(world)
    world.take(2000)
    world.look(60)
    world.take(-2000)

    assert world.look(30) == []
    assert [type(each) for each in world.look(FIRST_WAIT_S + 60)] == [Grow]
    assert layers(world) == at_first


def test_the_highest_rank_grows_first() -> None:
    world = dual()
    world.take(5000)
    world.look(300)
    world.take(-4000)

    (first, *_) = world.look(600)
    assert isinstance(first, Grow)
    assert first.service == "chat"


def test_one_layer_is_not_worth_a_restart_unless_it_is_the_last() -> None:
    world = World([Model("code", 1, all_layers=90, layer_bytes=300 * MIB)])
    world.models[0].layers -= 1
    assert world.look(3600) == []

    world.models[0].all_layers = world.models[0].layers + 1
    assert world.look(3600) == [Grow("code")]


def test_a_service_grows_only_while_nobody_has_to_wait_for_it() -> None:
    world = dual()
    world.take(2000)
    world.look(60)
    world.take(-2000)
    world.models[1].may_pause = False
    assert world.look(3600) == []
    world.models[1].may_pause = True
    assert [type(each) for each in world.look(60)] == [Grow]


def test_what_shrinks_soon_after_it_grew_waits_longer_each_time() -> None:
    world = dual()
    grew_at: list[float] = []
    while len(grew_at) < 6:
        world.take(2000)
        world.look(60)
        world.take(-2000)
        while not any(isinstance(each, Grow) for each in world.look()):
            pass
        grew_at.append(world.now)

    gaps = [later - earlier for earlier, later in pairwise(grew_at)]
    assert all(later > 1.5 * earlier for earlier, later in pairwise(gaps))


def test_growing_that_comes_to_nothing_is_tried_less_and_less_often() -> None:
    """Given a plan that promises what the load does not get."""
    world = dual()
    stuck = replace(
        world.observation().tenants[1],
        extent=Extent(30, is_whole=False),
        possible=Extent(90, is_whole=True),
    )
    room = replace(world.observation().budget, free_bytes=3000 * MIB)
    seen = Observation(room, (stuck,), is_settled=True)
    balance, grown = world.balance, 0
    for now in range(0, 24 * 3600, 5):
        balance, actions = step(balance, seen, float(now))
        grown += len(actions)

    assert 2 <= grown <= 20


def test_a_plan_is_asked_for_rarely_where_it_gives_nothing() -> None:
    world = World([Model("code", 1, all_layers=90, layer_bytes=300 * MIB)])
    world.models[0].layers -= 1
    asked = 0
    for _ in range(720):
        found = world.observation()
        asked += sum(1 for _ in growing(world.balance, found, world.now))
        world.look()

    assert asked <= 3600 / 30


def test_a_small_card_has_a_small_drift() -> None:
    small = Budget("card", 400 * MIB, 20 * MIB, 16 * MIB, 400 * MIB)
    seen = Observation(small, (), is_settled=True)

    assert seen.drift_bytes < 14 * MIB
    assert not seen.is_pressed
    assert replace(seen, budget=replace(small, free_bytes=4 * MIB)).is_pressed


def test_a_ceiling_keeps_memory_free_like_a_headroom() -> None:
    budget = Budget("card", TOTAL, 300 * MIB, HEADROOM, TOTAL - 1000 * MIB)
    seen = Observation(budget, (), is_settled=True)

    assert seen.missing_bytes == 700 * MIB
    assert seen.is_pressed
    assert not seen.is_squeezed


def test_the_experts_of_a_layer_count_as_one_more() -> None:
    asked = Options(gpu_layers=49)
    demand = Demand(
        "code", "moe.gguf", 49, asked, no_price, lambda _: 0, frozenset(Knob), has_experts=True
    )

    assert extent(asked, demand) == Extent(49 + 48, is_whole=True)
    assert extent(replace(asked, n_cpu_moe=40), demand) == Extent(49 + 8, is_whole=False)
    assert extent(replace(asked, gpu_layers=20, n_cpu_moe=48), demand) == Extent(20, is_whole=False)
    assert extent(replace(asked, gpu_layers=0), demand) == Extent(0, is_whole=False)


def test_what_was_degraded_is_whole_again_before_it_counts_as_such() -> None:
    world = dual()
    code = replace(
        world.observation().tenants[1],
        extent=Extent(30, is_whole=False),
        possible=Extent(30, is_whole=True),
    )
    room = replace(world.observation().budget, free_bytes=3000 * MIB)
    seen = Observation(room, (code,), is_settled=True)
    balance, _ = step(Balance("auto"), seen, 100.0)

    assert step(balance, seen, 200.0)[1] == (Grow("code"),)
    none_more = replace(code, possible=Extent(30, is_whole=False))
    assert step(balance, replace(seen, tenants=(none_more,)), 200.0)[1] == ()


def no_price(_: Options) -> Price:
    raise AssertionError("nobody asks for it")


# --- whatever other programs do -------------------------------------------------------------------

SEQUENCES = st.lists(
    st.tuples(st.integers(0, 6200), st.sampled_from([5, 10, 20, 60, 300])),
    min_size=1,
    max_size=120,
)
MODES: st.SearchStrategy[Rebalance] = st.sampled_from(["off", "shrink", "auto"])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    count = draw(st.integers(1, 4))
    models = [
        Model(
            f"s{rank}",
            rank,
            all_layers=draw(st.integers(1, 60)),
            layer_bytes=draw(st.integers(1, 200)) * MIB,
            may_change=draw(st.booleans()),
            may_pause=draw(st.booleans()),
        )
        for rank in range(count)
    ]
    return World(models, draw(MODES))


@given(worlds(), SEQUENCES)
def test_the_choice_is_never_a_wrong_one(world: World, sequence: list[tuple[int, int]]) -> None:
    for size_mib, seconds in sequence:
        world.outside = size_mib * MIB
        for _ in range(seconds // 5):
            before = world.observation().tenants
            for action in world.look():
                assert world.rebalance != "off" or not isinstance(action, Shrink | Grow)
                assert world.rebalance == "auto" or not isinstance(action, Grow)
                if isinstance(action, Shrink | Grow):
                    chosen = next(each for each in before if each.service == action.service)
                    assert chosen.may_change
                if isinstance(action, Shrink):
                    assert chosen.extent.layers > 0
                    assert action.by_bytes > 0
                    lower = before[before.index(chosen) + 1 :]
                    assert not any(each.may_change and each.extent.layers for each in lower)
                if isinstance(action, Grow):
                    assert chosen.may_pause
                    assert layers(world)[action.service] > chosen.extent.layers


@given(worlds(), SEQUENCES)
def test_no_sequence_makes_a_service_flap(world: World, sequence: list[tuple[int, int]]) -> None:
    """In any hour a service grows at most 6 times, and shrinks at most 20 times."""
    for size_mib, seconds in sequence:
        world.outside = size_mib * MIB
        world.look(seconds)
    for model in world.models:
        for kind, most in ((Grow, 6), (Shrink, 20)):
            times = [
                at
                for at, each in world.actions
                if isinstance(each, kind) and each.service == model.name
            ]
            for first in times:
                assert sum(first <= at < first + 3600 for at in times) <= most


@pytest.mark.parametrize("pause_s", [0, 60, 900, 1200])
def test_a_program_that_takes_whenever_a_service_has_grown_causes_few_restarts(
    pause_s: int,
) -> None:
    world = dual()
    while world.now < 1000.0 + 24 * 3600:
        world.take(2000)
        world.look(60)
        world.take(-2000)
        deadline = world.now + 4 * 3600
        while world.now < deadline and not any(isinstance(each, Grow) for each in world.look()):
            pass
        world.look(pause_s)
    changes = [at for at, each in world.actions if isinstance(each, Shrink | Grow)]

    assert max(sum(at <= other < at + 3600 for other in changes) for at in changes) <= 12


@given(MODES.filter(lambda mode: mode != "off"), SEQUENCES)
def test_where_all_may_give_there_is_no_lasting_pressure(
    rebalance: Rebalance, sequence: list[tuple[int, int]]
) -> None:
    world = dual(rebalance)
    for size_mib, seconds in sequence:
        world.outside = min(size_mib, 5800) * MIB
        world.look(seconds)
    world.look(600)
    assert not world.observation().is_pressed or not any(layers(world).values())
