"""Signs of life to a verdict: what moves, waits or is idle is never hung; what hangs always is."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.schema import Liveness
from llmsup.core.liveness import (
    GAP_PERIODS,
    IDLE_CPU_S,
    IDLE_CPU_SHARE,
    Pulse,
    Vitals,
    Voice,
    Work,
    observe,
    patience_s,
    period_s,
)

POLICY = Liveness(timeout_s=30.0)
PERIOD_S = period_s(POLICY)
BUSY = Vitals(voice=Voice.ANSWERED, work=Work(2, {"n_decode_total": 7}), is_healthy=True)
SILENT = Vitals(voice=Voice.SILENT)
STOPPED = Vitals(is_stopped=True)
TRACED = Vitals(voice=Voice.SILENT, is_traced=True)
IDLE = Vitals(voice=Voice.ANSWERED, work=Work(0, {"n_decode_total": 7}))
ANSWERING = Vitals(voice=Voice.ANSWERED)
REFUSING = Vitals(voice=Voice.UNKNOWN)

policies = st.floats(2.0, 600.0).map(lambda timeout_s: Liveness(timeout_s=timeout_s))
hanging = st.lists(st.sampled_from([BUSY, SILENT, STOPPED]), min_size=8, max_size=40)


def watched(
    looks: Iterable[Vitals], policy: Liveness = POLICY, every_s: float | None = None
) -> list[Pulse]:
    """The pulse after each of `looks`, one period apart."""
    pulse, now, pulses = None, 0.0, []
    for vitals in looks:
        pulse = observe(pulse, vitals, now, policy)
        pulses.append(pulse)
        now += every_s or period_s(policy)
    return pulses


def reasons(looks: Iterable[Vitals], policy: Liveness = POLICY) -> list[str]:
    return [pulse.reason for pulse in watched(looks, policy)]


@pytest.mark.parametrize(
    ("vitals", "reason"),
    [
        (BUSY, "says it is healthy but decoded nothing for 20s with 2 requests pending"),
        (
            replace(BUSY, work=Work(1), is_healthy=False),
            "decoded nothing for 20s with 1 request pending",
        ),
        (SILENT, "answered nothing for 20s and used no CPU time"),
        (
            replace(SILENT, is_healthy=True),
            "says it is healthy but did not tell what it does for 20s and used no CPU time",
        ),
        (STOPPED, "stopped by a signal, has not moved for 20s"),
    ],
)
def test_what_hangs_is_found_and_told_in_a_sentence(vitals: Vitals, reason: str) -> None:
    assert reasons([vitals] * 5) == ["", "", "", "", reason]


@given(hanging, policies)
def test_a_hang_is_found_a_period_and_an_answer_before_the_time_is_up(
    looks: list[Vitals], policy: Liveness
) -> None:
    """Given a hang that begins right after a look, which another look has still to notice."""
    count = int(policy.timeout_s / period_s(policy)) + 1
    pulses = watched([IDLE, *islice(cycle(looks), count)], policy)
    first = next(pulse for pulse in pulses if pulse.reason)
    assert first.at <= policy.timeout_s - period_s(policy)
    assert first.at - first.since >= patience_s(policy)
    assert all(pulse.reason for pulse in pulses if pulse.at >= first.at)


@given(hanging)
def test_nothing_is_a_verdict_before_its_time(looks: list[Vitals]) -> None:
    for pulse in watched(looks):
        assert bool(pulse.reason) == (pulse.at - pulse.since >= patience_s(POLICY))


SIGNS = ("cpu_s", "faults", "gpu", "n_decode_total", "prompt_tokens_total", "slot 0 tokens")


@given(st.lists(st.sampled_from(SIGNS), min_size=1, max_size=60), st.integers(1, 3))
def test_whatever_moves_starts_the_window_anew(moves: list[str], pause: int) -> None:
    """Given requests pending all the time, and any sign that moves in every `pause`th look."""
    counts = dict.fromkeys(SIGNS, 0)
    looks = []
    for move in moves:
        for n in range(pause):
            has_moved = n == pause - 1
            counts[move] += has_moved
            counters = {sign: float(counts[sign]) for sign in SIGNS[3:]}
            looks.append(
                Vitals(
                    cpu_s=counts["cpu_s"] * 1.0,
                    faults=counts["faults"] * 1000,
                    is_gpu_busy=has_moved and move == "gpu",
                    voice=Voice.ANSWERED,
                    work=Work(1, counters),
                )
            )
    for pulse, vitals in zip(watched(looks), looks, strict=True):
        assert not pulse.reason, vitals


@given(st.lists(st.sampled_from([IDLE, ANSWERING, REFUSING, TRACED, Vitals()]), max_size=100))
def test_what_is_idle_refuses_or_is_debugged_is_never_hung(looks: list[Vitals]) -> None:
    assert not any(reasons(looks))


@given(hanging, st.floats(0.01, 1e6))
def test_a_gap_in_our_own_looks_counts_for_nothing(looks: list[Vitals], extra_s: float) -> None:
    gap_s = GAP_PERIODS * PERIOD_S + extra_s
    for pulse in watched(looks, every_s=gap_s):
        assert (pulse.since, pulse.reason) == (pulse.at, "")


@given(st.sampled_from([BUSY, SILENT]), st.integers(8, 60))
def test_the_cost_of_our_own_questions_is_no_life(vitals: Vitals, count: int) -> None:
    """Given the CPU time of two clock ticks and of one per cent of a core, it is hung."""
    looks = [
        replace(vitals, cpu_s=min(IDLE_CPU_S, n * 0.01) + n * PERIOD_S * IDLE_CPU_SHARE / 2)
        for n in range(count)
    ]
    assert reasons(looks)[4]


def test_a_server_that_works_slowly_is_left_alone() -> None:
    """Given three per cent of a core, over and over, and no other sign, it is not hung."""
    looks = [replace(SILENT, cpu_s=n * PERIOD_S * 0.03) for n in range(200)]
    assert not any(reasons(looks))


def test_a_tree_that_lost_a_process_has_moved() -> None:
    looks = [replace(SILENT, cpu_s=100.0 - n, faults=10) for n in range(20)]
    assert not any(reasons(looks))


def test_a_busy_card_says_nothing_about_a_stopped_process() -> None:
    assert (
        reasons([replace(STOPPED, is_gpu_busy=True)] * 5)[4]
        == "stopped by a signal, has not moved for 20s"
    )


def test_a_counter_that_was_not_told_for_a_while_is_compared_with_the_last_one_told() -> None:
    moved = replace(BUSY, work=Work(2, {"n_decode_total": 8}))
    assert not any(reasons([BUSY, SILENT, SILENT, SILENT, moved, SILENT, SILENT, SILENT]))
    assert reasons([BUSY, SILENT, SILENT, SILENT, BUSY])[4]


@given(st.lists(st.sampled_from([BUSY, SILENT, STOPPED])))
def test_a_timeout_of_nothing_is_never_reached(looks: list[Vitals]) -> None:
    assert not any(reasons(looks, Liveness(timeout_s=0.0)))
