"""Who holds what of the card, and who waits for it. Pure: only its methods make a changed table.

One service at a time has the turn: its plan is made of what is free just then, its process fills
the card, and the turn ends once it is known what that took. While memory of a process that ends is
on its way back nobody has it, for so long. So no plan counts on memory that another one takes.

A lease belongs to one generation of its service, and follows the life of that service: with the
process its turn and its bytes are gone, whatever became of whoever asked for them. `now` is a
monotonic time in seconds; NVML's figures are handed in, in bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Self

from llmsup.core.plan import Placement

RETURN_TIMEOUT_S = 10.0
RETURN_BLIND_S = 2.0
MISSING_SHARE = 0.1
MISSING_BYTES = 64 * 2**20
"""Memory is back once NVML has all of it free again but for so much (the larger of the two: others
come and go meanwhile), or after the first of the time-outs; after the second where it is not known
what was free before."""

LEAST_SHARE = 0.25
"""A load takes no less than this of what was planned, whatever was measured: so far off is none."""

Rank = tuple[bool, int, str]
"""Sorts by whose turn comes first."""


def rank(name: str, priority: int = 0, *, pinned: bool = False) -> Rank:
    """Pinned services first, then the higher priority, then by name."""
    return (not pinned, -priority, name)


class Standing(Enum):
    """How a service stands with the card. One that is not listed has nothing of it."""

    WAITING = "waiting"  # for its turn
    LOADING = "loading"  # has the turn, or was adopted and not seen to be ready yet
    SETTLING = "settling"  # loaded; has the turn until it is known what it took
    HELD = "held"
    LEAVING = "leaving"  # told to end; what it holds comes back


TAKES_THE_TURN = frozenset({Standing.LOADING, Standing.SETTLING})


class Step(Enum):
    """What happens to a lease."""

    ASKED = "asked"
    ADOPTED = "adopted"
    GRANTED = "granted"
    PUT_OFF = "put off"
    PLACED_OFF = "placed off the card"
    LOADED = "loaded"
    SETTLED = "settled"
    TOLD_TO_END = "told to end"
    GONE = "gone"


_W, _L, _S, _H, _E = Standing
NEXT: dict[Step, dict[Standing | None, Standing | None]] = {
    Step.ASKED: {None: _W},
    Step.ADOPTED: {None: _L},
    Step.GRANTED: {_W: _L},
    Step.PUT_OFF: {_L: _W},
    Step.PLACED_OFF: {_L: _H},
    Step.LOADED: {_L: _S},
    Step.SETTLED: {_S: _H},
    Step.TOLD_TO_END: {_W: None, _L: _E, _S: _E, _H: _E},
    Step.GONE: {_W: None, _L: None, _S: None, _H: None, _E: None},
}
"""What becomes of a lease, None being that there is none. What is not listed changes nothing."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What one generation of a service has of the card.

    `placement` is None until its plan is made. `free_bytes`: what was free when it was made, None
    where that is not known. `measured_bytes`: what the card lost to it, None until that is known.
    `is_alone`: nothing else came or went since, so that the difference is its own.
    """

    service: str
    generation: int
    rank: Rank
    standing: Standing = Standing.WAITING
    placement: Placement | None = None
    free_bytes: int | None = None
    measured_bytes: int | None = None
    is_alone: bool = True

    @property
    def planned_bytes(self) -> int:
        """What its plan gives it; 0 while there is none."""
        return 0 if self.placement is None else self.placement.price.device_bytes

    @property
    def bytes(self) -> int:
        """What it takes, as well as that is known."""
        return self.planned_bytes if self.measured_bytes is None else self.measured_bytes


@dataclass(frozen=True, slots=True)
class Returning:
    """Memory on its way back: `bytes` on top of what was free before (None: not known)."""

    services: tuple[str, ...]
    bytes: int
    before_bytes: int | None
    until: float

    def is_over(self, free_bytes: int | None, now: float) -> bool:
        """Whether it is back, or nobody waits for it any longer."""
        if now >= self.until:
            return True
        if self.before_bytes is None or free_bytes is None:
            return False
        may_be_missing = max(MISSING_SHARE * self.bytes, MISSING_BYTES)
        return free_bytes >= self.before_bytes + self.bytes - may_be_missing


@dataclass(frozen=True)
class Leases:
    """All leases by service. `calm_free_bytes`: what was free when last nothing came or went."""

    table: Mapping[str, Lease]
    returning: Returning | None = None
    calm_free_bytes: int | None = None

    # --- what is

    def of(self, service: str) -> Lease | None:
        """Its lease."""
        return self.table.get(service)

    def is_waiting(self, service: str) -> bool:
        """Whether it waits for its turn."""
        lease = self.table.get(service)
        return lease is not None and lease.standing is Standing.WAITING

    def holds(self, service: str) -> bool:
        """Whether it may have memory of the card."""
        lease = self.table.get(service)
        return lease is not None and lease.standing is not Standing.WAITING

    @property
    def held_bytes(self) -> int:
        """What is held for good, as well as that is known."""
        return sum(lease.bytes for lease in self._in(Standing.HELD))

    @property
    def ours_bytes(self) -> int:
        """At most so much of the card is held, being filled, or on its way back."""
        kept = sum(lease.bytes for lease in self._in(*TAKES_THE_TURN, Standing.HELD))
        return kept + (0 if self.returning is None else self.returning.bytes)

    @property
    def waiting(self) -> list[Lease]:
        """Those that wait, the next one first."""
        return sorted(self._in(Standing.WAITING), key=lambda lease: lease.rank)

    @property
    def settling(self) -> Lease | None:
        """The one of which it is being found out what it took."""
        return next(self._in(Standing.SETTLING), None)

    @property
    def is_taken(self) -> bool:
        """Whether somebody has the turn."""
        return any(self._in(*TAKES_THE_TURN))

    @property
    def next_up(self) -> Lease | None:
        """Whose turn it is now; None while somebody has it or memory comes back."""
        if self.returning is not None or self.is_taken:
            return None
        return next(iter(self.waiting), None)

    def why(self, service: str) -> str:
        """What one that waits is waiting for, in words."""
        loading = [lease.service for lease in self._in(*TAKES_THE_TURN)]
        if loading:
            return f"waits for the card: {_listed(loading)} loading"
        if self.returning is not None:
            whose = ", ".join(self.returning.services)
            return f"waits for {self.returning.bytes / 2**20:.0f} MiB to come back from {whose}"
        first = [lease.service for lease in self.waiting if lease.rank < self.table[service].rank]
        return f"waits for the card: {', '.join(first)} first" if first else ""

    # --- what happens

    def asked(self, service: str, generation: int, its_rank: Rank) -> Self:
        """It wants to load."""
        return self._begin(Step.ASKED, Lease(service, generation, its_rank))

    def adopted(
        self,
        service: str,
        generation: int,
        its_rank: Rank,
        placement: Placement | None,
        measured_bytes: int | None,
    ) -> Self:
        """An earlier daemon let it load. Whether it has done so is not known yet."""
        lease = Lease(service, generation, its_rank, measured_bytes=measured_bytes, is_alone=False)
        after = self._begin(Step.ADOPTED, lease)
        is_its = after is not self and placement is not None
        return after.placed(service, placement) if is_its and placement is not None else after

    def granted(self, service: str, free_bytes: int | None, *, is_sure: bool = True) -> Self:
        """Its turn begins, with so much free. Not `is_sure`: nothing can be measured by that."""
        return self._step(service, Step.GRANTED, free_bytes=free_bytes, is_alone=is_sure)

    def put_off(self, service: str) -> Self:
        """There is no room for it yet: its turn ends, and it waits for another one."""
        return self._step(service, Step.PUT_OFF, free_bytes=None)

    def placed(self, service: str, placement: Placement) -> Self:
        """Its plan is made. Off the card it needs no turn any more."""
        after = self._change(service, placement=placement)
        if placement.options.gpu_layers == 0:
            return after._step(service, Step.PLACED_OFF, measured_bytes=0)
        return after

    def loaded(self, service: str) -> Self:
        """It is ready, so all that it takes for now is taken. Nothing is measured of adopted ones:
        what was free before them is not known.
        """
        after = self._step(service, Step.LOADED)
        lease = after.of(service)
        if lease is not None and lease.free_bytes is None:
            return after._step(service, Step.SETTLED)
        return after

    def settled(self, service: str, free_bytes: int | None) -> Self:
        """What is free has stopped changing since it is ready."""
        lease = self.table.get(service)
        if lease is None or lease.standing is not Standing.SETTLING:
            return self
        after = self._step(service, Step.SETTLED)
        if free_bytes is None or lease.free_bytes is None or not lease.is_alone:
            return after
        measured_bytes = max(0, lease.free_bytes - free_bytes)
        if measured_bytes < LEAST_SHARE * lease.planned_bytes:
            return after._calmed(free_bytes)  # another program freed memory meanwhile
        return after._change(service, measured_bytes=measured_bytes)._calmed(free_bytes)

    def told_to_end(self, service: str, now: float) -> Self:
        """Its process was told to end: from here on its memory comes back."""
        lease = self.table.get(service)
        if lease is None or lease.standing is Standing.LEAVING:
            return self
        return self._returning_from(lease, now)._step(service, Step.TOLD_TO_END)

    def gone(self, service: str, now: float) -> Self:
        """Its process has ended, or it does not wait any more."""
        lease = self.table.get(service)
        if lease is None:
            return self
        after = self._returning_from(lease, now)
        return after._step(service, Step.GONE)

    def read(self, free_bytes: int | None, now: float) -> Self:
        """NVML was read; None: in vain."""
        after = self
        if self.returning is not None and self.returning.is_over(free_bytes, now):
            after = replace(self, returning=None)
        return after if free_bytes is None else after._calmed(free_bytes)

    # --- inside

    def _in(self, *standings: Standing) -> Iterator[Lease]:
        return (lease for lease in self.table.values() if lease.standing in standings)

    def _begin(self, step: Step, lease: Lease) -> Self:
        standing = None if lease.service in self.table else NEXT[step][None]
        if standing is None:
            return self
        return replace(self, table={**self.table, lease.service: replace(lease, standing=standing)})

    def _step(self, service: str, step: Step, **changes: Any) -> Self:
        """The one place where the standing of a lease changes."""
        lease = self.table.get(service)
        if lease is None or lease.standing not in NEXT[step]:
            return self
        standing = NEXT[step][lease.standing]
        if standing is None:
            return replace(
                self, table={name: each for name, each in self.table.items() if name != service}
            )
        return self._change(service, standing=standing, **changes)

    def _change(self, service: str, **changes: Any) -> Self:
        if service not in self.table:
            return self
        changed = replace(self.table[service], **changes)
        return replace(self, table={**self.table, service: changed})

    def _calmed(self, free_bytes: int) -> Self:
        is_moving = self.returning or any(self._in(*TAKES_THE_TURN, Standing.LEAVING))
        return self if is_moving else replace(self, calm_free_bytes=free_bytes)

    def _returning_from(self, lease: Lease, now: float) -> Self:
        """What `lease` holds begins to come back, or, its process having ended, ought to be."""
        if lease.standing is Standing.WAITING or lease.bytes == 0:
            return self
        before = self.returning
        if before is None:
            returning = Returning((lease.service,), lease.bytes, self._free_now(), now)
        elif lease.service in before.services:
            returning = before
        else:
            services = (*before.services, lease.service)
            returning = replace(before, services=services, bytes=before.bytes + lease.bytes)
        is_blind = returning.before_bytes is None
        until = now + (RETURN_BLIND_S if is_blind else RETURN_TIMEOUT_S)
        disturbed = {
            each.service: replace(each, is_alone=False) for each in self._in(*TAKES_THE_TURN)
        }
        return replace(
            self, table={**self.table, **disturbed}, returning=replace(returning, until=until)
        )

    def _free_now(self) -> int | None:
        """What is free once a load that goes on is done; None where that is not known."""
        loader = next(self._in(*TAKES_THE_TURN), None)
        if loader is None or loader.free_bytes is None:
            return self.calm_free_bytes
        return loader.free_bytes - loader.planned_bytes


NOTHING = Leases({})
"""Before anybody asks."""


def _listed(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
