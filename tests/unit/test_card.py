"""When a card counts as lost, and when its services get new processes."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.card import (
    RENEW_GAP_S,
    SUSPECT_S,
    Action,
    Card,
    Clocks,
    Condition,
    NoteJump,
    NoteLoss,
    Renew,
    step,
)
from llmsup.core.device import Absence, Device, NoDevice, Reading

HEALTHY = Device(0, "GPU-1", "RTX 4050", "560", 6000, 5000, 1000)
LOST = NoDevice(Absence.LOST, "the card is lost")
ERROR = NoDevice(Absence.ERROR, "NVML fails")
SILENT = NoDevice(Absence.SILENT, "no answer")
NONE = NoDevice(Absence.NO_LIBRARY, "no driver")
PERIOD_S = 5.0


class History:
    """Readings one after another, on clocks of their own."""

    def __init__(self) -> None:
        self.card = Card()
        self.clocks = Clocks(100.0, 100.0, 1e9)
        self.actions: list[tuple[float, Action]] = []

    def see(self, *readings: Reading, period_s: float = PERIOD_S) -> list[Action]:
        seen: list[Action] = []
        for reading in readings:
            self.away(period_s, period_s, period_s)
            self.card, actions = step(self.card, reading, self.clocks)
            self.actions += [(self.clocks.monotonic_s, action) for action in actions]
            seen += actions
        return seen

    def away(self, monotonic_s: float, boottime_s: float, wall_s: float) -> None:
        now = self.clocks
        self.clocks = Clocks(
            now.monotonic_s + monotonic_s, now.boottime_s + boottime_s, now.wall_s + wall_s
        )

    def suspend(self, seconds: float) -> None:
        self.away(0.0, seconds, seconds)


def test_a_loss_is_answered_once_when_the_card_is_back() -> None:
    history = History()

    assert history.see(HEALTHY, HEALTHY) == []
    assert history.see(LOST, LOST, LOST) == [NoteLoss("the card is lost")]
    assert history.see(HEALTHY, HEALTHY) == [Renew("the card is lost", 3 * PERIOD_S)]


def test_a_machine_without_a_card_is_not_watched() -> None:
    history = History()
    history.see(NONE)
    history.suspend(3600)

    assert history.see(NONE, LOST, ERROR, NONE) == []
    assert history.see(HEALTHY) == []


@pytest.mark.parametrize("seconds", [2, 3600, 86400 * 30])
def test_sleep_alone_restarts_nothing(seconds: float) -> None:
    history = History()
    history.see(HEALTHY)
    history.suspend(seconds)

    (jump,) = history.see(HEALTHY, HEALTHY)

    assert isinstance(jump, NoteJump)
    assert jump.away_s == pytest.approx(seconds)


def test_an_error_after_a_sleep_is_a_loss_at_once() -> None:
    history = History()
    history.see(HEALTHY)
    history.suspend(3600)

    actions = history.see(HEALTHY, ERROR, HEALTHY)

    assert [type(action) for action in actions] == [NoteJump, NoteLoss, Renew]


def test_a_pause_of_the_virtual_machine_counts_like_a_sleep() -> None:
    history = History()
    history.see(HEALTHY)
    history.away(0.0, 0.0, 30.0)

    assert [type(action) for action in history.see(ERROR, HEALTHY)] == [NoteJump, NoteLoss, Renew]


def test_a_clock_that_is_set_back_or_a_little_is_no_jump() -> None:
    history = History()
    history.see(HEALTHY)
    history.away(0.0, 0.0, -7200.0)
    assert history.see(HEALTHY) == []
    history.away(0.0, 0.2, 3.0)
    assert history.see(HEALTHY) == []


def test_one_error_passes_and_errors_that_last_are_a_loss() -> None:
    history = History()

    assert history.see(HEALTHY, ERROR, HEALTHY, ERROR, HEALTHY) == []
    assert history.see(ERROR, ERROR, ERROR) == [NoteLoss("NVML fails")]


def test_long_after_a_sleep_one_error_passes_again() -> None:
    history = History()
    history.see(HEALTHY)
    history.suspend(3600)
    history.see(HEALTHY)

    assert history.see(HEALTHY, ERROR, HEALTHY, period_s=SUSPECT_S) == []


def test_silence_says_nothing() -> None:
    history = History()
    history.see(HEALTHY)

    assert history.see(SILENT, SILENT, SILENT, HEALTHY) == []
    assert history.see(LOST, SILENT, SILENT) == [NoteLoss("the card is lost")]


def test_a_card_that_never_comes_back_restarts_nothing() -> None:
    history = History()
    history.see(HEALTHY)

    for reading in (LOST, ERROR, NONE, SILENT) * 50:
        history.see(reading)

    assert [action for _, action in history.actions] == [NoteLoss("the card is lost")]
    assert history.card.condition is Condition.LOST


def test_a_card_that_comes_and_goes_does_not_restart_each_time() -> None:
    history = History()
    history.see(HEALTHY)

    for _ in range(6):
        history.see(LOST, HEALTHY)

    assert [type(each) for _, each in history.actions] == [NoteLoss, Renew, NoteLoss]
    assert [type(each) for each in history.see(HEALTHY, period_s=RENEW_GAP_S)] == [Renew]


ABSENT = st.builds(NoDevice, st.sampled_from(Absence), st.just("why"))
MOMENTS = st.tuples(
    st.one_of(st.just(HEALTHY), ABSENT),
    st.floats(0.1, 30.0),
    st.sampled_from([0.0, 0.0, 2.0, 3600.0]),
    st.sampled_from([0.0, 0.0, 30.0, -30.0]),
)


@given(st.lists(MOMENTS, max_size=60))
def test_never_two_restarts_for_one_loss(
    moments: list[tuple[Reading, float, float, float]],
) -> None:
    """Whatever is read: each restart has a loss of its own before it, a device when it comes, and
    a distance from the last one.
    """
    history = History()
    for reading, period_s, slept_s, set_s in moments:
        history.away(0.0, slept_s, slept_s + set_s)
        seen = history.see(reading, period_s=period_s)
        if any(isinstance(action, Renew) for action in seen):
            assert isinstance(reading, Device)
    told = [(at, each) for at, each in history.actions if not isinstance(each, NoteJump)]
    kinds = [type(action) for _, action in told]
    assert kinds == [NoteLoss, Renew] * (len(kinds) // 2) + [NoteLoss] * (len(kinds) % 2)
    restarts = [at for at, action in told if isinstance(action, Renew)]
    gaps = [later - earlier for earlier, later in pairwise(restarts)]
    assert min(gaps, default=math.inf) >= RENEW_GAP_S


@given(st.lists(MOMENTS, max_size=60))
def test_without_an_error_nothing_restarts(
    moments: list[tuple[Reading, float, float, float]],
) -> None:
    history = History()
    for _, period_s, slept_s, set_s in moments:
        history.away(0.0, slept_s, slept_s + set_s)
        actions = history.see(HEALTHY, period_s=period_s)
        assert all(isinstance(action, NoteJump) for action in actions)


@pytest.mark.parametrize(
    ("total", "free", "used", "doubt"),
    [
        (6000, 5000, 1000, ""),
        (6000, 6000, 0, ""),
        (0, 0, 0, "0 bytes of memory in total"),
        (-1, 0, 0, "-1 bytes of memory in total"),
        (6000, 6001, 0, "6001 bytes free of 6000"),
        (6000, -1, 0, "-1 bytes free of 6000"),
        (6000, 0, 6001, "6001 bytes used of 6000"),
    ],
)
def test_figures_that_cannot_be_true(total: int, free: int, used: int, doubt: str) -> None:
    assert Device(0, "GPU-1", "name", "560", total, free, used).doubt == doubt
