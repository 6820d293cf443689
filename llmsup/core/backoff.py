"""How long to wait after a death, and when deaths have become a crash loop.

Deaths are counted in a sliding window: `max_deaths` within `window_s` is a crash loop, and a death
older than the window is forgotten, so both the delay and the verdict decay by themselves.
The first death costs no delay: a server that crashed once should be back at once.
"""

from random import Random

from llmsup.config.schema import Restart

Deaths = tuple[float, ...]
"""Monotonic times of recent deaths, oldest first; never more than `max_deaths` of them."""


def record(deaths: Deaths, now: float, restart: Restart) -> Deaths:
    """The deaths still in the window, with one more at `now`."""
    recent = tuple(at for at in deaths if now - at < restart.window_s)
    return (*recent, now)[-restart.max_deaths :]


def is_crash_loop(deaths: Deaths, restart: Restart) -> bool:
    """Whether the last `max_deaths` deaths fell into one window."""
    return (
        len(deaths) >= restart.max_deaths
        and deaths[-1] - deaths[-restart.max_deaths] < restart.window_s
    )


def delay_s(deaths: Deaths, restart: Restart, seed: str) -> float:
    """Seconds to wait after the last death: 0, then `backoff` doubling up to `max_backoff`.

    Half of it is jitter, drawn from `seed`, so that services which died of one cause do not come
    back in step. Pure: the same seed gives the same delay.
    """
    repeats = len(deaths) - 1
    if repeats <= 0:
        return 0.0
    full = min(restart.backoff_s * 2.0 ** min(repeats - 1, 60), restart.max_backoff_s)
    return full * Random(seed).uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
