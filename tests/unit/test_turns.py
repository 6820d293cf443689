"""Whose turn it is to have the one place: nobody starves, nobody jumps the queue, no thrashing."""

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.service import Service, State, Want
from llmsup.core.turns import (
    SETBACK_MAX_S,
    Present,
    Turn,
    next_turn,
    serving_since,
    set_back,
)

DWELL_S = 10.0
LOAD_MAX_S = 7.0
NAMES = ("chat", "code", "rag")

arrivals = st.lists(
    st.tuples(st.floats(0, 60), st.sampled_from(NAMES)), min_size=1, max_size=40
).map(sorted)
loads_s = st.lists(st.floats(0.1, LOAD_MAX_S), min_size=100, max_size=100)


@dataclass(frozen=True)
class Request:
    service: str
    at: float


@dataclass(frozen=True)
class Swap:
    service: str
    at: float
    served_s: float | None
    queue: tuple[str, ...]


def play(
    coming: list[tuple[float, str]], loads: list[float]
) -> tuple[list[tuple[Request, float]], list[Swap]]:
    """Requests come, and whoever has the place answers all of its own at once.

    Returns when each was answered, and the swaps.
    """
    requests = [Request(name, at) for at, name in coming]
    waiting: list[Request] = []
    answered: list[tuple[Request, float]] = []
    made: list[Swap] = []
    present: Present | None = None
    ready_at = now = 0.0
    while requests or waiting:
        while requests and requests[0].at <= now:
            waiting.append(requests.pop(0))
        if present is not None and present.since is None and now >= ready_at:
            present = replace(present, since=now)
        if present is not None and present.since is not None:
            answered += [(each, now) for each in waiting if each.service == present.service]
            waiting = [each for each in waiting if each.service != present.service]
        queue = tuple(dict.fromkeys(each.service for each in waiting))
        turn = next_turn(queue, present, DWELL_S, now)
        if turn is not None and turn.at <= now:
            since = None if present is None else present.since
            made.append(Swap(turn.service, now, None if since is None else now - since, queue))
            ready_at = now + loads[len(made) % len(loads)]
            present = Present(turn.service, None)
        nexts = [each.at for each in requests[:1]]
        if present is not None and present.since is None:
            nexts.append(ready_at)
        elif turn is not None and turn.at > now:
            nexts.append(turn.at)
        now = min(nexts, default=now)
    return answered, made


@given(arrivals, loads_s)
def test_whoever_waits_is_answered_after_at_most_one_turn_of_each_other(
    coming: list[tuple[float, str]], loads: list[float]
) -> None:
    answered, _ = play(coming, loads)

    assert len(answered) == len(coming)
    bound_s = len(NAMES) * (DWELL_S + LOAD_MAX_S)
    assert all(at - request.at <= bound_s for request, at in answered)


@given(arrivals, loads_s)
def test_there_is_at_most_one_swap_per_dwell_time(
    coming: list[tuple[float, str]], loads: list[float]
) -> None:
    _, made = play(coming, loads)

    assert made[0].served_s is None
    assert all(each.served_s is not None for each in made[1:])
    assert all(each.served_s >= DWELL_S - 1e-6 for each in made[1:] if each.served_s is not None)


@given(arrivals, loads_s)
def test_the_first_to_wait_has_the_first_turn(
    coming: list[tuple[float, str]], loads: list[float]
) -> None:
    _, made = play(coming, loads)

    assert all(each.service == each.queue[0] for each in made)


def test_nobody_else_waits_for_one_that_fails() -> None:
    failing = Present("chat", since=None, is_failing=True)

    assert next_turn(["chat", "code"], failing, DWELL_S, 5.0) == Turn("code", 5.0)


def test_the_present_one_waits_for_no_turn() -> None:
    assert next_turn(["chat"], Present("chat", 0.0), DWELL_S, 99.0) is None
    assert next_turn([], None, DWELL_S, 99.0) is None


def test_it_serves_from_its_first_readiness_whatever_dies_in_between() -> None:
    loading = Service("chat", want=Want.UP, state=State.STARTING)
    ready = replace(loading, state=State.READY)

    assert serving_since({}, [loading], 1.0) == {}
    since = serving_since({}, [ready], 2.0)
    assert since == {"chat": 2.0}
    since = serving_since(since, [replace(ready, state=State.BACKOFF)], 3.0)
    assert serving_since(since, [ready], 4.0) == {"chat": 2.0}
    assert serving_since(since, [replace(ready, want=Want.DOWN)], 5.0) == {}


def test_each_failure_is_waited_out_twice_as_long_up_to_a_minute() -> None:
    setback, delays_s = None, []
    for _ in range(6):
        setback = set_back(setback, "it died", 100.0)
        delays_s.append(setback.until - 100.0)

    assert delays_s == [5, 10, 20, 40, SETBACK_MAX_S, SETBACK_MAX_S]
