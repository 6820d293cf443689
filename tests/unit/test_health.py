"""Probe results to readiness."""

from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.schema import Readiness
from llmsup.core.health import Health, Outcome, ProbeResult, observe, until_next_s

PASS = ProbeResult(Outcome.PASSED)
FAIL = ProbeResult(Outcome.FAILED, "connection refused")
LOADING = ProbeResult(Outcome.LOADING, "loading model")


def fold(results: list[ProbeResult], policy: Readiness) -> list[bool]:
    health, seen = Health(), []
    for result in results:
        health = observe(health, result, policy)
        seen.append(health.is_ready)
    return seen


def test_one_pass_makes_ready_and_three_failures_in_a_row_unready() -> None:
    results = [FAIL, LOADING, PASS, FAIL, FAIL, PASS, FAIL, FAIL, FAIL, PASS]
    assert fold(results, Readiness()) == [
        False, False, True, True, True, True, True, True, False, True,
    ]  # fmt: skip


def test_a_probe_that_could_not_be_made_says_nothing() -> None:
    unknown = ProbeResult(Outcome.UNKNOWN, "too many open files")
    results = [PASS, unknown, unknown, unknown, unknown, FAIL, FAIL, unknown, FAIL]
    assert fold(results, Readiness()) == [True] * 8 + [False]


def test_thresholds_count_consecutive_results_only() -> None:
    policy = Readiness(success_threshold=2, failure_threshold=1)
    assert fold([PASS, FAIL, PASS, PASS, FAIL, PASS], policy) == [
        False, False, False, True, False, False,
    ]  # fmt: skip


@given(st.floats(0, 1e7), st.floats(0.01, 3600))
def test_services_with_one_period_are_probed_at_the_same_moments(
    now: float, period_s: float
) -> None:
    pause_s = until_next_s(now, period_s)

    assert period_s * 0.5 <= pause_s <= period_s * 1.5
    late_s = (now + pause_s + period_s / 2) % period_s - period_s / 2
    assert abs(late_s) < 1e-6
