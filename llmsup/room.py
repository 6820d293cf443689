"""Who waits for room on the card, who leaves for whom, and whose turn is next because of it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from llmsup.core.eviction import Decision, Fits
from llmsup.core.leases import Lease, Leases


class Room(Protocol):
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


class Queue:
    """Services that found no room, in the order in which they came.

    What others left is promised to the one for whom they did: nobody else has a turn before.
    """

    def __init__(self) -> None:
        self._look_at: dict[str, float] = {}  # from when on each is tried again
        self._leaving: dict[str, int] = {}  # generations that leave the card
        self._promised = ""

    def __contains__(self, service: str) -> bool:
        return service in self._look_at

    def put_off(self, service: str, until: float) -> None:
        """It is not tried again before `until`; its place in the queue stays what it was."""
        self._look_at[service] = until

    def promise(self, service: str, leaving: Mapping[str, int], now: float) -> None:
        """These generations leave for it."""
        self._look_at.setdefault(service, now)
        self._promised = service
        self._leaving = dict(leaving)

    def drop(self, service: str) -> None:
        """It has room, or does not want any."""
        self._look_at.pop(service, None)

    def look_again(self, now: float) -> None:
        """Somebody left: there may be room for any of them."""
        self._look_at = dict.fromkeys(self._look_at, now)

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
        queue = (name for name, at in self._look_at.items() if name in waiting and at <= now)
        rest = (name for name in waiting if name not in self._look_at)
        first = next(queue, None) or next(rest, None)
        return None if first is None else waiting[first]

    def why(self, service: str) -> str:
        """What one that waits is waiting for, in words; empty where it is nobody's leaving."""
        if service not in self._look_at:
            return ""
        if service == self._promised:
            leaving = ", ".join(self._leaving)
            return f"waits for {leaving} to make room" if leaving else ""
        return "waits for room: who could leave the card may not yet"
