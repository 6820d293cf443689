"""Whose turn it is to have the one place of single mode, and from when on.

A service waits from its first request on, and they take turns in that order. Who has the place
keeps it for a minimum dwell time from when it first served, and then gives way as soon as anybody
waits, however busy it is: so a stream of requests keeps nobody else from having a turn, and two
clients that alternate cost one swap per dwell time. `now` is a monotonic time in seconds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmsup.core.service import Service, State, Want

SETBACK_S = 5.0
SETBACK_MAX_S = 60.0


@dataclass(frozen=True)
class Present:
    """The service that has the place, and since when it serves; None: not yet.

    `is_failing`: it does not serve, and is not about to.
    """

    service: str
    since: float | None
    is_failing: bool = False


@dataclass(frozen=True)
class Turn:
    """This service gets the place, at this time or later."""

    service: str
    at: float


def next_turn(
    waiting: Iterable[str], present: Present | None, min_dwell_s: float, now: float
) -> Turn | None:
    """The next turn; None while nobody waits, or the present one has yet to serve.

    `waiting`: the services that requests wait for, the one of the first request first.
    """
    first = next((name for name in waiting if present is None or name != present.service), None)
    if first is None:
        return None
    if present is None or present.is_failing:
        return Turn(first, now)
    return None if present.since is None else Turn(first, present.since + min_dwell_s)


def serving_since(
    last: Mapping[str, float], services: Iterable[Service], now: float
) -> dict[str, float]:
    """Since when each service serves: from when it was ready first since it was wanted up.

    `last` is what was known so far. A restart in between changes nothing.
    """
    return {
        each.name: last.get(each.name, now)
        for each in services
        if each.want is Want.UP and (each.name in last or each.state is State.READY)
    }


@dataclass(frozen=True)
class Setback:
    """A turn that failed: `why`, and until when no other one is tried."""

    why: str
    until: float
    delay_s: float


def set_back(last: Setback | None, why: str, now: float) -> Setback:
    """One more turn of a service failed; `last` is the one before, if none went well since."""
    delay_s = SETBACK_S if last is None else min(2 * last.delay_s, SETBACK_MAX_S)
    return Setback(why, now + delay_s, delay_s)
