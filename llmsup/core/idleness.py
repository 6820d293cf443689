"""How long a service has been without a request, from what Envoy counts."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Activity:
    """One generation of a service: its requests so far, and when there was last one.

    `at` is a monotonic time; a generation that had none yet counts from when it was first seen.
    `is_busy`: one was being answered at the last look.
    """

    generation: int
    total: int
    at: float
    is_busy: bool = False


def observe(
    last: Activity | None, generation: int, *, active: int, total: int, now: float
) -> Activity:
    """What is known after a look at `now`: so many requests are being answered, so many were."""
    is_same = last is not None and (last.generation, last.total) == (generation, total)
    if last is not None and is_same and not active:
        return replace(last, is_busy=False)
    return Activity(generation, total, now, is_busy=active > 0)


def is_idle(activity: Activity, ttl_s: float, now: float) -> bool:
    """Whether it has been without a request for its whole `ttl_s`; 0 is never."""
    return ttl_s > 0 and now - activity.at >= ttl_s
