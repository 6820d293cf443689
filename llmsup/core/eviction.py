"""Which services leave the card for one that finds no room on it. Pure.

Only those may that a request loads again, and no pinned one. They go by priority, the lowest
first, and then by when they were last used, and no more of them than it takes. Each of them has
served for a minimum dwell time before, so services that cannot be there together cost one load each
in that time. Whoever answers requests is drained, but only for a service of its own priority or a
higher one. Whoever is idle makes room for any: a request is worth more than a model at rest.

`now` is a monotonic time in seconds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LOOK_AGAIN_S = 1.0

Fits = Callable[[int], bool]
"""Whether there is room once so many bytes more are free."""


@dataclass(frozen=True)
class Tenant:
    """A service that a request loads again, and the `bytes` that it holds.

    `since`: from when on it serves, None: not yet. `is_leaving`: it goes anyway.
    """

    service: str
    priority: int
    bytes: int
    since: float | None
    used_at: float
    is_busy: bool = False
    is_leaving: bool = False


@dataclass(frozen=True)
class Evict:
    """These leave, and then there is room."""

    services: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """There will be room, but one of these has to leave that may not yet: look again then.

    `is_sure`: they may by then, or are gone. Else they answer requests, for nobody knows how long.
    """

    until: float
    services: tuple[str, ...]
    is_sure: bool = True


Decision = Evict | Wait


def make_room(
    priority: int, tenants: Iterable[Tenant], fits: Fits, min_dwell_s: float, now: float
) -> Decision | None:
    """Who leaves for a service of this priority; None: there is no room even without them all."""
    ranked = sorted(tenants, key=lambda each: (each.priority, each.used_at, each.service))
    if not fits(_bytes(ranked)):
        return None
    leaving = [each for each in ranked if each.is_leaving]
    staying = [each for each in ranked if not each.is_leaving]
    coming_bytes = _bytes(leaving)
    if leaving and fits(coming_bytes):
        return Wait(now + LOOK_AGAIN_S, _names(leaving))
    may_leave = [each for each in staying if not each.is_busy or each.priority <= priority]
    if not fits(coming_bytes + _bytes(may_leave)):
        busy = [each for each in staying if each not in may_leave]
        return Wait(now + LOOK_AGAIN_S, _names(busy), is_sure=False)
    chosen = _fewest(may_leave, coming_bytes, fits)
    until = max(_dwells_until(each, min_dwell_s, now) for each in chosen)
    return Evict(_names(chosen)) if until <= now else Wait(until, _names(chosen))


def _dwells_until(tenant: Tenant, min_dwell_s: float, now: float) -> float:
    return now + LOOK_AGAIN_S if tenant.since is None else tenant.since + min_dwell_s


def _fewest(ranked: Sequence[Tenant], coming_bytes: int, fits: Fits) -> list[Tenant]:
    """The first that make room together with what comes back anyway, none of them in vain."""
    chosen: list[Tenant] = []
    for each in ranked:
        if fits(coming_bytes + _bytes(chosen)):
            break
        chosen.append(each)
    for each in reversed(tuple(chosen)):
        rest = [other for other in chosen if other is not each]
        if fits(coming_bytes + _bytes(rest)):
            chosen = rest
    return chosen


def _bytes(tenants: Iterable[Tenant]) -> int:
    return sum(each.bytes for each in tenants)


def _names(tenants: Iterable[Tenant]) -> tuple[str, ...]:
    return tuple(each.service for each in tenants)
