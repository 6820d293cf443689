"""Deaths, delays and crash loops."""

from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.schema import Restart
from llmsup.core import backoff

RESTART = Restart(backoff_s=1.0, max_backoff_s=60.0, max_deaths=5, window_s=600.0)


def test_delay_doubles_up_to_the_limit_with_half_of_it_jitter() -> None:
    delays = [backoff.delay_s((0.0,) * count, RESTART, "chat:1") for count in range(1, 12)]
    assert delays[0] == 0.0
    for exponent, delay in enumerate(delays[1:]):
        full = min(2.0**exponent, 60.0)
        assert full / 2 <= delay <= full


def test_services_that_died_together_do_not_come_back_in_step() -> None:
    delays = {backoff.delay_s((0.0, 1.0), RESTART, f"service-{n}:7") for n in range(50)}
    assert len(delays) == 50


def test_the_window_forgets() -> None:
    deaths: backoff.Deaths = ()
    for now in (0.0, 100.0, 200.0, 300.0):
        deaths = backoff.record(deaths, now, RESTART)
    assert not backoff.is_crash_loop(deaths, RESTART)
    assert backoff.is_crash_loop(backoff.record(deaths, 400.0, RESTART), RESTART)
    assert backoff.record(deaths, 700.0, RESTART) == (200.0, 300.0, 700.0)
    assert backoff.record(deaths, 5000.0, RESTART) == (5000.0,)


@given(
    st.lists(st.floats(0, 1000), max_size=40).map(sorted),
    st.builds(
        Restart,
        backoff_s=st.floats(0, 10),
        max_backoff_s=st.floats(0, 100),
        max_deaths=st.integers(1, 8),
        window_s=st.floats(0.1, 1000),
    ),
)
def test_a_crash_loop_is_exactly_max_deaths_within_the_window(
    times: list[float], restart: Restart
) -> None:
    deaths: backoff.Deaths = ()
    for index, now in enumerate(times):
        deaths = backoff.record(deaths, now, restart)
        in_window = [at for at in times[: index + 1] if now - at < restart.window_s]
        assert backoff.is_crash_loop(deaths, restart) == (len(in_window) >= restart.max_deaths)
        assert 0.0 <= backoff.delay_s(deaths, restart, "x") <= restart.max_backoff_s
