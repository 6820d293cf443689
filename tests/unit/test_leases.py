"""Who may load when: walked at random, then the rules one by one."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from llmsup.core.leases import (
    NEXT,
    NOTHING,
    RETURN_BLIND_S,
    RETURN_TIMEOUT_S,
    TAKES_THE_TURN,
    Leases,
    Standing,
    Step,
    rank,
)
from llmsup.core.options import Options
from llmsup.core.plan import Placement, Price
from llmsup.core.sizes import Estimate, Sizes

MIB = 2**20
TOTAL = 6000 * MIB


def placement(service: str, mib: int, layers: int = 10) -> Placement:
    price = Price(Estimate(Sizes(mib * MIB), Sizes()), 0)
    return Placement(service, "model.gguf", 37, Options(layers if mib else 0), price, "")


def asked(*names: str) -> Leases:
    leases = NOTHING
    for number, name in enumerate(names):
        leases = leases.asked(name, 1, rank(name, -number))
    return leases


def held(name: str, mib: int, free_mib: int = 5000) -> Leases:
    leases = asked(name).granted(name, free_mib * MIB).placed(name, placement(name, mib))
    return leases.loaded(name).settled(name, (free_mib - mib) * MIB)


def next_up(leases: Leases) -> str | None:
    return leases.next_up.service if leases.next_up else None


def test_every_step_is_in_the_table_and_every_standing_ends() -> None:
    assert set(NEXT) == set(Step)
    assert set(NEXT[Step.GONE]) == set(Standing)
    assert set(NEXT[Step.GONE].values()) == {None}


def test_pinned_goes_first_then_the_higher_priority_then_the_name() -> None:
    leases = NOTHING
    for name, priority, pinned in (
        ("b", 5, False),
        ("c", 9, False),
        ("a", 5, False),
        ("d", 0, True),
    ):
        leases = leases.asked(name, 1, rank(name, priority, pinned=pinned))
    assert [lease.service for lease in leases.waiting] == ["d", "c", "a", "b"]
    assert leases.why("b") == "waits for the card: d, c, a first"


def test_one_loads_at_a_time_and_the_next_once_it_has_settled() -> None:
    leases = asked("chat", "code").granted("chat", 5000 * MIB)
    leases = leases.placed("chat", placement("chat", 2000))
    assert (next_up(leases), leases.why("code")) == (None, "waits for the card: chat is loading")

    leases = leases.loaded("chat")
    assert next_up(leases) is None

    leases = leases.settled("chat", 2900 * MIB)
    assert next_up(leases) == "code"
    assert leases.table["chat"].measured_bytes == 2100 * MIB


def test_what_is_ours_is_held_or_being_filled_or_on_its_way_back() -> None:
    leases = held("chat", 2000).asked("code", 1, rank("code")).asked("other", 1, rank("other"))
    leases = leases.granted("code", 3000 * MIB).placed("code", placement("code", 1500))
    assert leases.ours_bytes == 3500 * MIB
    assert leases.told_to_end("chat", 0.0).ours_bytes == 3500 * MIB
    assert leases.gone("chat", 0.0).ours_bytes == 3500 * MIB
    assert leases.gone("chat", 0.0).read(None, RETURN_TIMEOUT_S).ours_bytes == 1500 * MIB


def test_a_lower_one_that_waits_yields_to_a_higher_one_that_comes_later() -> None:
    leases = held("embedding", 300).asked("code", 1, rank("code", 0))
    assert next_up(leases.asked("chat", 1, rank("chat", 10))) == "chat"


def test_one_that_is_placed_off_the_card_needs_no_turn() -> None:
    leases = asked("chat", "code").granted("chat", 100 * MIB)
    leases = leases.placed("chat", placement("chat", 0))
    assert (next_up(leases), leases.table["chat"].bytes) == ("code", 0)
    assert leases.gone("chat", 0.0).returning is None


def test_memory_has_to_come_back_before_anybody_plans() -> None:
    leases = held("chat", 2000).asked("code", 1, rank("code"))
    leases = leases.told_to_end("chat", 100.0).gone("chat", 101.0)
    assert next_up(leases) is None
    assert leases.why("code") == "waits for 2000 MiB to come back from chat"

    assert next_up(leases.read(4700 * MIB, 102.0)) is None
    assert next_up(leases.read(4800 * MIB, 102.0)) == "code"
    assert next_up(leases.read(3000 * MIB, 101.0 + RETURN_TIMEOUT_S)) == "code"
    assert next_up(leases.read(None, 101.0 + RETURN_TIMEOUT_S)) == "code"


def test_a_reading_in_which_memory_is_half_back_does_not_count_as_calm() -> None:
    leases = held("chat", 2000).told_to_end("chat", 100.0)
    assert leases.read(4000 * MIB, 100.5).calm_free_bytes == 3000 * MIB


def test_a_process_that_does_not_end_keeps_nobody_waiting_for_ever() -> None:
    leases = held("chat", 2000).asked("code", 1, rank("code")).told_to_end("chat", 100.0)
    late = leases.read(3000 * MIB, 100.0 + RETURN_TIMEOUT_S)
    assert next_up(late) == "code"

    gone = late.gone("chat", 120.0)
    assert next_up(gone) is None
    assert next_up(gone.read(4900 * MIB, 120.1)) == "code"


def test_what_died_while_it_loaded_comes_back_to_what_was_free_before() -> None:
    leases = asked("chat", "code").granted("chat", 5000 * MIB)
    leases = leases.placed("chat", placement("chat", 2000)).gone("chat", 10.0)
    assert next_up(leases.read(4000 * MIB, 10.1)) is None
    assert next_up(leases.read(5000 * MIB, 10.1)) == "code"


def test_nothing_is_measured_of_a_load_during_which_another_process_left() -> None:
    leases = held("code", 1000, 6000).asked("chat", 1, rank("chat")).granted("chat", 5000 * MIB)
    leases = leases.placed("chat", placement("chat", 2000)).gone("code", 10.0).loaded("chat")
    leases = leases.settled("chat", 4000 * MIB)
    assert (leases.table["chat"].measured_bytes, leases.table["chat"].bytes) == (None, 2000 * MIB)
    assert next_up(leases.asked("code", 2, rank("code"))) is None
    assert next_up(leases.asked("code", 2, rank("code")).read(3950 * MIB, 11.0)) == "code"


def test_an_adopted_process_has_the_turn_until_it_is_seen_to_be_ready() -> None:
    leases = NOTHING.adopted("chat", 3, rank("chat"), placement("chat", 2000), 2050 * MIB)
    leases = leases.asked("code", 1, rank("code")).read(3000 * MIB, 0.0)
    assert next_up(leases) is None

    leases = leases.loaded("chat")
    assert (next_up(leases), leases.table["chat"].standing) == ("code", Standing.HELD)
    assert leases.table["chat"].measured_bytes == 2050 * MIB


def test_an_adopted_process_that_dies_unmeasured_is_waited_for_a_short_while() -> None:
    leases = NOTHING.adopted("chat", 3, rank("chat"), placement("chat", 2000), None)
    leases = leases.gone("chat", 5.0).asked("chat", 4, rank("chat"))
    assert next_up(leases.read(5000 * MIB, 5.1)) is None
    assert next_up(leases.read(5000 * MIB, 5.0 + RETURN_BLIND_S)) == "chat"


def test_without_any_reading_loads_are_still_one_after_another() -> None:
    leases = asked("chat", "code").read(None, 0.0).granted("chat", None)
    leases = leases.placed("chat", placement("chat", 2000))
    assert next_up(leases) is None
    leases = leases.loaded("chat")
    assert (next_up(leases), leases.table["chat"].bytes) == ("code", 2000 * MIB)


NAMES = ("chat", "code", "embedding", "rerank")
EVENTS = st.sampled_from(["ask", "grant", "ready", "settle", "end", "die", "wait", "back", "other"])


@dataclass
class World:
    """A card, and processes that do what their placements say; memory comes back in its time."""

    leases: Leases = NOTHING
    now: float = 0.0
    generation: int = 0
    outside: int = 500 * MIB
    taken: dict[str, int] = field(default_factory=dict)
    late: int = 0  # of processes that have ended, not back yet

    @property
    def free(self) -> int:
        return TOTAL - self.outside - sum(self.taken.values()) - self.late

    def do(self, event: str, name: str, mib: int) -> None:
        lease = self.leases.of(name)
        self.now += 0.1
        if event == "ask":
            self.generation += 1
            self.leases = self.leases.asked(name, self.generation, rank(name, NAMES.index(name)))
        elif event == "grant":
            self.leases = self.leases.read(self.free, self.now)
            due = self.leases.next_up
            if due is not None:
                size = min(mib * MIB, self.free)
                self.taken[due.service] = size
                self.leases = self.leases.granted(due.service, self.free + size)
                what = placement(due.service, size // MIB)
                self.leases = self.leases.placed(due.service, what)
        elif event == "ready":
            self.leases = self.leases.loaded(name)
        elif event == "settle":
            self.leases = self.leases.settled(name, self.free)
        elif event == "end":
            self.leases = self.leases.told_to_end(name, self.now)
        elif event == "die" and lease is not None:
            self.late += self.taken.pop(name, 0)
            self.leases = self.leases.gone(name, self.now)
        elif event == "back":
            self.late = 0
        elif event == "other":
            self.outside = max(0, min(self.outside + self.free, mib * MIB))
        elif event == "wait":
            self.now += mib / 100
        self.leases = self.leases.read(self.free, self.now)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(EVENTS, st.sampled_from(NAMES), st.integers(0, 3000)), min_size=1, max_size=60
    )
)
def test_whatever_happens_one_loads_at_a_time_and_no_turn_is_lost(
    steps: list[tuple[str, str, int]],
) -> None:
    world = World()
    for step in steps:
        world.do(*step)
        loading = [e for e in world.leases.table.values() if e.standing in TAKES_THE_TURN]
        assert len(loading) <= 1
        assert sum(world.taken.values()) + world.outside + world.late <= TOTAL
        assert set(world.taken) <= set(world.leases.table)
        for lease in world.leases.waiting:
            assert world.leases.why(lease.service) or world.leases.next_up == lease

    # Whoever has the turn gets on or dies, and then everybody who waits gets theirs.
    for _ in range(2 * len(NAMES)):
        for lease in list(world.leases.table.values()):
            if lease.standing is Standing.LEAVING:
                world.do("die", lease.service, 0)
            elif lease.standing in TAKES_THE_TURN:
                world.do("ready", lease.service, 0)
                world.do("settle", lease.service, 0)
        world.do("wait", "chat", 2000)
        world.do("grant", "chat", 100)
    assert not world.leases.waiting


def test_a_measurement_far_below_the_plan_is_another_program_s() -> None:
    leases = asked("chat").granted("chat", 5000 * MIB).placed("chat", placement("chat", 2000))
    freed = leases.loaded("chat").settled("chat", 4700 * MIB)
    assert (freed.table["chat"].measured_bytes, freed.table["chat"].bytes) == (None, 2000 * MIB)
    less = leases.loaded("chat").settled("chat", 3500 * MIB)
    assert less.table["chat"].measured_bytes == 1500 * MIB
