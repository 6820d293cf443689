"""Places one service on the card: gathers what is asked of it, and has a plan made.

Who ran out of memory is remembered here, since it bounds what may be asked the next time.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from llmsup.core import grant, shrinking
from llmsup.core.conforming import conforms
from llmsup.core.device import Device, NoDevice, Reading
from llmsup.core.grant import Grant
from llmsup.core.leases import Lease, Rank, rank
from llmsup.core.plan import Budget, Demand, Placement, Plan, Price
from llmsup.core.shrinking import Shrunk
from llmsup.core.sizes import Estimate, Sizes
from llmsup.errors import LlmsupError, ModelFileError, NoRoomError
from llmsup.services import llama_log

log = logging.getLogger(__name__)

ADOPTED = "as an earlier daemon placed it"


class Sizer(Protocol):
    """Knows what services ask of the card and what there is; see `Sizing`."""

    def demand(
        self, service: str, at_most_bytes: int | None = None, *, reading: Reading | None = None
    ) -> Demand:
        """What a service asks of the card that was read. Raises ModelFileError."""
        ...

    def budget(
        self, device: Device, *, reserved_bytes: int = 0, coming_back_bytes: int = 0
    ) -> Budget:
        """What there is for services on the card as it was read."""
        ...


Planner = Callable[[Budget | None, Iterable[Demand], str], Plan]


@dataclass(frozen=True)
class Placed:
    """A plan was made for one generation of a service, with so much free (None: not known).

    `before`: its last one, under this daemon. `ran_out`: that one's process ran out of memory.
    """

    placement: Placement
    generation: int
    free_bytes: int | None = None
    before: Placement | None = None
    ran_out: bool = False

    @property
    def why(self) -> str:
        """What it was given and why, in words."""
        given = self.placement
        words = given.reason
        if given.options.gpu_layers:
            words = f"{planned(given, self.free_bytes)}: {words}"
        if self.ran_out and self.before is not None:
            change = f"{self.before.options.gpu_layers} → {given.options.gpu_layers} layers"
            words = f"{change} after it ran out of memory; {words}"
        return words


class Placing:
    """Places the services of one stack, one at a time."""

    def __init__(self, sizer: Sizer, plan: Planner) -> None:
        self._sizer = sizer
        self._plan = plan
        self._may_shrink: dict[str, bool] = {}
        self._shrunk: dict[str, Shrunk] = {}

    def place(
        self,
        name: str,
        others: Sequence[str],
        reading: Reading,
        at_most_bytes: int | None = None,
    ) -> Placement | None:
        """What one service gets, those `others` being left theirs, and `at_most_bytes` of it.

        None where the header of its model tells nothing. Raises NoRoomError. Call it in a thread.
        """
        try:
            own = self._demand(name, reading, at_most_bytes)
        except ModelFileError:
            return None  # the engine may know more of the file than we do
        if isinstance(reading, NoDevice):
            return self._plan(None, [own], reading.reason).of(name)
        demands = [own]
        for each in others:
            with suppress(LlmsupError):  # its needs are not known: nothing is kept for it
                demands.append(self._demand(each, reading))
        budget = self._sizer.budget(reading)
        plan = self._plan(budget, demands, "")
        if plan.refusal:
            self._require_room(own, budget, reading)
            plan = self._plan(budget, self._compatible(budget, own, demands), "")
        return plan.of(name)

    def _require_room(self, demand: Demand, budget: Budget, reading: Device) -> None:
        """Raise NoRoomError where there is none even with nobody else to keep some for."""
        refusal = self._plan(budget, [demand], "").refusal
        if refusal:
            empty = self._sizer.budget(_empty(reading))
            unbounded = replace(demand, at_most_bytes=None)
            is_hopeless = bool(self._plan(empty, [unbounded], "").refusal)
            raise NoRoomError(refusal, permanent=is_hopeless, shortage=not is_hopeless)

    def _compatible(self, budget: Budget, own: Demand, demands: Iterable[Demand]) -> list[Demand]:
        """Those that leave a plan possible, by rank. Raises NoRoomError where `own` does not."""
        chosen: list[Demand] = []
        for each in sorted(demands, key=_rank):
            refusal = self._plan(budget, [*chosen, each], "").refusal
            if not refusal:
                chosen.append(each)
            elif each is own:
                raise NoRoomError(refusal, shortage=True)
        return chosen

    def _demand(self, service: str, reading: Reading, bound_bytes: int | None = None) -> Demand:
        free_bytes = reading.free_bytes if isinstance(reading, Device) else None
        shrunk = self._shrunk.get(service)
        if shrunk is not None and not shrunk.still_holds(free_bytes):
            self._shrunk.pop(service, None)
            shrunk = None
        bounds = [bound_bytes, shrunk.at_most_bytes if shrunk else None]
        at_most_bytes = min((each for each in bounds if each is not None), default=None)
        demand = self._sizer.demand(service, at_most_bytes, reading=reading)
        self._note_knobs(demand)
        return demand

    def recall(self, service: str, written: str, card: Device | None) -> tuple[Grant, bool]:
        """What a live process was given, and whether it could be given it now."""
        found = grant.read(written)
        options, device = found.options, found.device
        if options is None:
            return Grant(None, device), True
        try:
            demand = self._sizer.demand(service, reading=card)
        except ModelFileError:
            # What became of its file is nothing to a process that has loaded it.
            unknown = Price(Estimate(Sizes(), Sizes()), overhead_bytes=0)
            kept = Placement(service, "", options.gpu_layers, options, unknown, ADOPTED)
            return Grant(kept, device, found.shrunk), True
        self._note_knobs(demand)
        price = demand.price(options)
        placement = Placement(service, demand.model, demand.layers, options, price, ADOPTED)
        is_same_card = card is None or device == card.uuid
        is_current = is_same_card and conforms(options, demand)
        if is_current and found.shrunk is not None:
            self._shrunk.setdefault(service, found.shrunk)
        return Grant(placement, device, found.shrunk), is_current

    def _note_knobs(self, demand: Demand) -> None:
        """Whether a plan could give it less than it has; see `core.ladder`."""
        may_choose = bool(demand.knobs) and not demand.pinned
        self._may_shrink[demand.service] = may_choose or bool(demand.degrade)

    def shrunk(self, service: str) -> Shrunk | None:
        """With how much it ran out of memory, where that is not over yet."""
        return self._shrunk.get(service)

    def ran_out(self, service: str) -> bool:
        """Whether it ran out of memory, and has not loaded since."""
        shrunk = self._shrunk.get(service)
        return shrunk is not None and shrunk.steps > 0

    def note_loaded(self, service: str) -> None:
        """It has loaded with what it was given."""
        if service in self._shrunk:
            self._shrunk[service] = shrinking.loaded(self._shrunk[service])

    def forget(self, service: str) -> None:
        """What it ran out of memory with says nothing any more: it has another model."""
        self._shrunk.pop(service, None)

    def note_out_of_memory(
        self, lease: Lease, placement: Placement, short_bytes: int | None
    ) -> tuple[str, bool]:
        """A process died of it: what to say, and whether its next plan is a smaller one."""
        service = lease.service
        shrunk = shrinking.shrink(
            self._shrunk.get(service), lease.planned_bytes, lease.free_bytes, short_bytes
        )
        self._shrunk[service] = shrunk
        words = f"it had {planned(placement, lease.free_bytes)}"
        if not self._may_shrink.get(service):
            return f"{words}, and its profile allows no smaller plan", False
        at_most = shrunk.at_most_bytes
        follows = f"next with at most {_mib(at_most)}" if at_most else "next on the CPU"
        return f"{words}; {follows}", True


def short_bytes(lines: Sequence[str], lease: Lease) -> int | None:
    """How much was missing, by the output of a process that ran out of memory."""
    if lease.placement is None or lease.free_bytes is None:
        return None
    overhead_bytes = lease.placement.price.overhead_bytes
    return llama_log.short_bytes(lines, overhead_bytes, lease.free_bytes)


def planned(placement: Placement, free_bytes: int | None) -> str:
    """What it was given of what was free, in words."""
    layers = f"{placement.options.gpu_layers} of {placement.layers} layers"
    free = "" if free_bytes is None else f" of {_mib(free_bytes)} free"
    return f"{layers}, {_mib(placement.price.device_bytes)} planned{free}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def _rank(demand: Demand) -> Rank:
    return rank(demand.service, demand.priority, pinned=demand.pinned)


def _empty(device: Device) -> Device:
    """The same card with nothing on it."""
    return replace(device, free_bytes=device.total_bytes, used_bytes=0)
