"""When a service counts as idle."""

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.idleness import Activity, is_idle, observe

looks = st.lists(st.tuples(st.floats(0.01, 100), st.booleans(), st.integers(0, 3)), min_size=1)


@given(looks, st.floats(0.1, 200))
def test_idle_is_without_a_request_in_flight_or_a_new_one_for_all_the_time(
    steps: list[tuple[float, bool, int]], ttl_s: float
) -> None:
    now, total, last_request = 0.0, 0, 0.0
    activity = observe(None, 1, active=0, total=0, now=now)
    for elapsed_s, is_busy, new in steps:
        now, total = now + elapsed_s, total + new
        activity = observe(activity, 1, active=int(is_busy), total=total, now=now)
        if is_busy or new:
            last_request = now
        assert is_idle(activity, ttl_s, now) == (now - last_request >= ttl_s)


def test_a_new_generation_counts_from_when_it_is_seen() -> None:
    assert observe(Activity(1, 7, 0.0), 2, active=0, total=7, now=60.0) == Activity(2, 7, 60.0)


def test_counts_that_begin_again_are_a_request() -> None:
    """Given an Envoy that was restarted, and counts from nothing."""
    assert observe(Activity(1, 7, 0.0), 1, active=0, total=0, now=60.0).at == 60.0


def test_without_a_ttl_nothing_is_idle() -> None:
    assert not is_idle(Activity(1, 0, 0.0), 0.0, 1e9)
