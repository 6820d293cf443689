"""Who waits for room on the card, who leaves for whom, and whose turn is next because of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmsup.core.eviction import Decision, Fits
from llmsup.core.leases import Lease, Leases


class Evicting(Protocol):
    """Has services leave the card for others; see `Eviction`."""

    def may_leave(self, service: str) -> bool:
        """Whether it would leave for others, so that nothing is kept for it."""
        ...

    async def decide(self, service: str, fits: Fits) -> Decision | None:
        """Who leaves for a service; None: nobody, it would be in vain. `fits` may take a while."""
        ...

    def evict(self, services: Sequence[str], service: str) -> None:
        """Have these leave for another one."""
        ...


@dataclass
class _Place:
    """A place in the queue: from when on it is tried again, and whether others wait behind it."""

    look_at: float
    is_sure: bool = True


class CardQueue:
    """Services that found no room, in the order in which they came.

    What others left is promised to the one for whom they did: nobody else has a turn before. And
    nobody has others leave while one waits that came earlier and knows when its turn is: else one
    that needs the whole card would wait for ever for others who come and go on it.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._leaving: dict[str, int] = {}  # generations that leave the card
        self._promised = ""

    def __contains__(self, service: str) -> bool:
        return service in self._places

    def put_off(self, service: str, until: float, *, is_sure: bool) -> None:
        """It is not tried again before `until`; its place in the queue stays what it was."""
        self._places[service] = _Place(until, is_sure)

    def behind_until(self, service: str, leases: Leases) -> float | None:
        """Until when one waits that came earlier and is sure of its turn; None: nobody does."""
        for name, place in self._places.items():
            if name == service:
                return None
            if place.is_sure and leases.is_waiting(name):
                return place.look_at
        return None

    def promise(self, service: str, leaving: Mapping[str, int], now: float) -> None:
        """These generations leave for it."""
        self._places.setdefault(service, _Place(now))
        self._promised = service
        self._leaving = dict(leaving)

    def drop(self, service: str) -> None:
        """It has room, or does not want any."""
        self._places.pop(service, None)
        if service == self._promised:
            self._promised = ""

    def look_again(self, now: float) -> None:
        """Somebody left: there may be room for any of them."""
        for place in self._places.values():
            place.look_at = now

    def is_being_made(self, leases: Leases) -> bool:
        """Whether somebody who leaves is still there."""
        self._leaving = {
            name: generation
            for name, generation in self._leaving.items()
            if (lease := leases.of(name)) is not None and lease.generation == generation
        }
        return bool(self._leaving)

    def next_up(self, leases: Leases, now: float) -> Lease | None:
        """Who may be placed next: the one for whom others left; one of the queue; then by rank."""
        waiting = {lease.service: lease for lease in leases.waiting}
        if self._promised in waiting:
            return waiting[self._promised]
        self._promised = ""
        for name, place in self._places.items():
            if name in waiting and place.look_at <= now:
                return waiting[name]
        return next((waiting[name] for name in waiting if name not in self._places), None)

    def why(self, service: str) -> str:
        """What one that waits is waiting for, in words; empty where it is nobody's leaving."""
        if service not in self._places:
            return ""
        if service == self._promised:
            leaving = ", ".join(self._leaving)
            return f"waits for {leaving} to make room" if leaving else ""
        return "waits for room: who could leave the card may not yet"
