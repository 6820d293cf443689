"""Lets one service after another onto the card, each with a plan made of what is free just then.

`core.leases` decides whose turn it is; here the card is read, the plan is made in a thread, and
what a load really took is found out. Leases follow the states of services (`note_change`), so no
turn outlives its process. One task decides (`keep`); whoever asks gets a future.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from llmsup.core import grant, leases, shrinking
from llmsup.core.conforming import conforms
from llmsup.core.device import Absence, Device, NoDevice, Reading
from llmsup.core.grant import UNPLANNED, Grant
from llmsup.core.leases import Lease, Leases, Rank, Standing
from llmsup.core.plan import Budget, Demand, Knob, Placement, Plan
from llmsup.core.service import ALIVE, Service, State, Want
from llmsup.core.shrinking import Shrunk
from llmsup.errors import LaunchError, LlmsupError, ModelFileError, NoRoomError

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 0.1
TURN_LOOK_S = 1.0
READING_PATIENCE_S = 5.0
READING_RETRY_S = 0.5
SETTLE_TIMEOUT_S = 5.0
SETTLE_LOOK_S = 0.2
STILL_BYTES = 4 * 2**20
ROOM_MIN_BYTES = 16 * 2**20
"""So much more has to be free before a service that was refused is tried again."""

MAY_PASS = frozenset({Absence.SILENT, Absence.ERROR, Absence.UNBELIEVABLE})


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
            words = f"{_planned(given, self.free_bytes)}: {words}"
        if self.ran_out and self.before is not None:
            change = f"{self.before.options.gpu_layers} → {given.options.gpu_layers} layers"
            words = f"{change} after it ran out of memory; {words}"
        return words


@dataclass
class _Asker:
    generation: int
    answer: asyncio.Future[Grant] = field(repr=False)


class CardGate:
    """The card of one stack.

    `read` reads it; `users` are the services that may use it, with their ranks; `services` has
    all of them as they are. `short_bytes` tells how much was missing, from the output of a process
    that ran out of memory. `on_placed` is told of each plan, `on_measured` of what a load took,
    and `on_no_card` once why there is none. `retry` has a service tried again that was refused.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Reading]],
        sizer: Sizer,
        plan: Planner,
        users: Mapping[str, Rank],
        services: Callable[[], Mapping[str, Service]],
        *,
        short_bytes: Callable[[Sequence[str], Lease], int | None] = lambda *_: None,
        on_placed: Callable[[Placed], None] = lambda _: None,
        on_measured: Callable[[Lease], None] = lambda _: None,
        on_no_card: Callable[[str], None] = lambda _: None,
        retry: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._read = read
        self._sizer = sizer
        self._plan = plan
        self._users = users
        self._services = services
        self._short_bytes = short_bytes
        self._on_placed = on_placed
        self._on_measured = on_measured
        self._on_no_card = on_no_card
        self._retry = retry
        self._leases = leases.NOTHING
        self._askers: dict[str, _Asker] = {}
        self._last_placed: dict[str, Placed] = {}
        self._ended: dict[str, Lease] = {}
        self._knobs: dict[str, frozenset[Knob]] = {}
        self._shrunk: dict[str, Shrunk] = {}
        self._bounds: dict[str, int] = {}  # of the next plan, and only of that
        self._refused: dict[str, int] = {}  # what was free at that time
        self._no_card = ""
        self._device: Device | None = None  # as it was read last, however long ago
        self._reading = asyncio.Lock()
        self._woken = asyncio.Event()

    @property
    def leases(self) -> Leases:
        """Who has what of it, and who waits."""
        return self._leases

    def lease(self, service: str) -> Lease | None:
        """What a service has of it."""
        return self._leases.of(service)

    def past(self, service: str, generation: int) -> tuple[Placed, Lease | None] | None:
        """What the last generation that was placed had; None where that was another one."""
        placed, lease = self._last_placed.get(service), self._ended.get(service)
        if placed is None or placed.generation != generation:
            return None
        return placed, lease if lease and lease.generation == generation else None

    async def read(self) -> Reading:
        """The card as it is now. One reading at a time: whoever comes later waits for theirs."""
        async with self._reading:
            reading = await self._read()
        free_bytes = reading.free_bytes if isinstance(reading, Device) else None
        self._change(self._leases.read(free_bytes, self._now()))
        if isinstance(reading, Device):
            self._device = reading
            self._retry_refused(reading.free_bytes)
        return reading

    # --- what keepers ask and tell

    def ask(self, service: str, generation: int) -> asyncio.Future[Grant]:
        """What a generation may have, once it is its turn: it may then be started at once.

        Raises LaunchError, NoRoomError for what cannot be placed. A question that became pointless
        is never answered.
        """
        answer = asyncio.get_running_loop().create_future()
        self._mend()
        self._askers[service] = _Asker(generation, answer)
        self._change(self._leases.asked(service, generation, self._users[service]))
        return answer

    def why(self, service: str) -> str:
        """What it waits for."""
        if not self._leases.is_waiting(service):
            return "is placed on the card"
        return self._leases.why(service) or "waits for the card to be read"

    def recall(self, service: str, written: str) -> tuple[Grant, bool]:
        """What a live process was given, and whether it could be given it now."""
        found = grant.read(written)
        if found is None:
            return UNPLANNED, True
        options, device = found
        try:
            demand = self._sizer.demand(service, reading=self._device)
        except ModelFileError:
            return UNPLANNED, False
        self._knobs[service] = demand.knobs
        price, why = demand.price(options), "as an earlier daemon placed it"
        placement = Placement(service, demand.model, demand.layers, options, price, why)
        is_same_card = self._device is None or device == self._device.uuid
        return Grant(placement, device), is_same_card and conforms(options, demand)

    def adopt(
        self, service: str, generation: int, grant: Grant, measured_bytes: int | None
    ) -> None:
        """A process of an earlier daemon goes on with what it has."""
        now = self._services()[service]
        if now.generation != generation or now.state not in ALIVE:
            return
        placement, rank = grant.placement, self._users[service]
        self._change(self._leases.adopted(service, generation, rank, placement, measured_bytes))
        if placement is not None:
            self._last_placed[service] = Placed(placement, generation)

    def note_change(self, _before: Service, after: Service) -> None:
        """A service is another one now; to be told of every change."""
        lease = self._leases.of(after.name)
        if lease is None:
            return
        if after.generation != lease.generation or after.state not in ALIVE:
            self._ended[after.name] = lease
            self._change(self._leases.gone(after.name, self._now()))
        elif after.state is State.STOPPING:
            self._change(self._leases.told_to_end(after.name, self._now()))
        elif after.state is State.READY and lease.standing is Standing.LOADING:
            self._change(self._leases.loaded(after.name))

    def note_out_of_memory(self, service: str, lines: Sequence[str]) -> tuple[str, bool]:
        """Its process died of it, and said `lines`.

        Returns what it had been given and what follows, in words, and whether its next plan is a
        smaller one.
        """
        lease = self._leases.of(service)
        if lease is None or lease.placement is None or lease.planned_bytes == 0:
            return "", False
        short_bytes = self._short_bytes(lines, lease)
        self._shrunk[service] = shrinking.shrink(
            self._shrunk.get(service), lease.planned_bytes, lease.free_bytes, short_bytes
        )
        words = f"it had {_planned(lease.placement, lease.free_bytes)}"
        if not self._knobs.get(service):
            return f"{words}, and its profile allows no smaller plan", False
        at_most = self._shrunk[service].at_most_bytes
        follows = f"next with at most {_mib(at_most)}" if at_most else "next on the CPU"
        return f"{words}; {follows}", True

    def bound_next(self, service: str, at_most_bytes: int) -> None:
        """The next plan of a service, and only that, takes at most so much."""
        self._bounds[service] = at_most_bytes

    async def outlook(self, service: str, device: Device) -> Placement | None:
        """What a service would get were it, and only it, started anew now; None: nothing new.

        `device` is the card as it was read; what the service has comes back to it.
        """
        lease = self._leases.of(service)
        free_bytes = device.free_bytes + (0 if lease is None else lease.bytes)
        without = replace(device, free_bytes=min(free_bytes, device.total_bytes))
        try:
            return await asyncio.to_thread(self._placed, service, (), without)
        except LlmsupError:
            return None

    # --- deciding

    async def keep(self) -> None:
        """Let services onto the card until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self._go_on()
            except Exception as error:
                log.exception("the card could not be planned for")
                self._fail_all(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._woken.wait()

    def _pause_s(self) -> float | None:
        if not self._leases.waiting:
            return None
        return TURN_LOOK_S if self._leases.is_taken else LOOK_PERIOD_S

    async def _go_on(self) -> None:
        self._mend()
        if (lease := self._leases.settling) is not None:
            await self._settle(lease)
        if not self._leases.waiting or self._leases.is_taken:
            return
        reading = await self._read_in_earnest()
        due = self._leases.next_up
        if due is not None:
            await self._grant(due, reading)

    async def _read_in_earnest(self) -> Reading:
        """The card, or why there is none; for a driver that only fails now, as it was last."""
        give_up_at = self._now() + READING_PATIENCE_S
        while True:
            reading = await self.read()
            if isinstance(reading, Device) or reading.absence not in MAY_PASS:
                return reading
            if self._now() >= give_up_at:
                return self._device or reading
            await asyncio.sleep(READING_RETRY_S)

    async def _grant(self, lease: Lease, reading: Reading) -> None:
        name = lease.service
        free_bytes = reading.free_bytes if isinstance(reading, Device) else None
        self._change(self._leases.granted(name, free_bytes))
        others = [each for each in self._users if each != name and self._is_to_come(each)]
        try:
            placement = await asyncio.to_thread(self._placed, name, others, reading)
        except LlmsupError as error:
            self._refuse(lease, error, free_bytes)
            return
        asker = self._asker_of(lease)
        if asker is None:
            return  # stopped meanwhile
        if isinstance(reading, NoDevice):
            self._say_no_card(reading.reason)
        else:
            self._no_card = ""
        if placement is not None:
            self._change(self._leases.placed(name, placement))
            self._tell_placed(placement, lease.generation, free_bytes)
        device = reading.uuid if isinstance(reading, Device) else None
        asker.answer.set_result(Grant(placement, device))

    def _placed(self, name: str, others: Sequence[str], reading: Reading) -> Placement | None:
        """The plan of one service that leaves those `others` what is theirs. In a thread."""
        try:
            own = self._demand(name, reading)
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
            plan = self._plan(budget, self._compatible(budget, demands), "")
        return plan.of(name)

    def _require_room(self, demand: Demand, budget: Budget, reading: Device) -> None:
        """Raise NoRoomError where there is none even with nobody else to keep some for."""
        refusal = self._plan(budget, [demand], "").refusal
        if refusal:
            empty = self._sizer.budget(_empty(reading))
            is_hopeless = bool(self._plan(empty, [demand], "").refusal)
            raise NoRoomError(refusal, permanent=is_hopeless, shortage=not is_hopeless)

    def _compatible(self, budget: Budget, demands: Sequence[Demand]) -> list[Demand]:
        """The first, and of the others, in order, those that leave a plan possible."""
        chosen = [demands[0]]
        for each in demands[1:]:
            if not self._plan(budget, [*chosen, each], "").refusal:
                chosen.append(each)
        return chosen

    def _demand(self, service: str, reading: Reading) -> Demand:
        free_bytes = reading.free_bytes if isinstance(reading, Device) else None
        shrunk = self._shrunk.get(service)
        if shrunk is not None and not shrunk.still_holds(free_bytes):
            del self._shrunk[service]
            shrunk = None
        bounds = [self._bounds.get(service), shrunk.at_most_bytes if shrunk else None]
        at_most_bytes = min((each for each in bounds if each is not None), default=None)
        demand = self._sizer.demand(service, at_most_bytes, reading=reading)
        self._knobs[service] = demand.knobs
        return demand

    def _is_to_come(self, service: str) -> bool:
        """Whether it is wanted, and will ask for its part of the card."""
        now = self._services()[service]
        is_hoped_for = now.want is Want.UP and now.state is not State.FAILED
        return is_hoped_for and not self._leases.holds(service)

    async def _settle(self, lease: Lease) -> None:
        give_up_at = self._now() + SETTLE_TIMEOUT_S
        before: int | None = None
        while True:
            reading = await self.read()
            now = reading.free_bytes if isinstance(reading, Device) else None
            if self._is_over(lease):
                return
            is_still = now is not None and before is not None and abs(now - before) < STILL_BYTES
            if is_still or self._now() >= give_up_at:
                break
            before = now
            await asyncio.sleep(SETTLE_LOOK_S)
        self._change(self._leases.settled(lease.service, now))
        settled = self._leases.of(lease.service)
        if lease.service in self._shrunk:
            self._shrunk[lease.service] = shrinking.loaded(self._shrunk[lease.service])
        if is_still and settled is not None and settled.measured_bytes is not None:
            self._on_measured(settled)

    def _is_over(self, lease: Lease) -> bool:
        now = self._leases.settling
        return now is None or (now.service, now.generation) != (lease.service, lease.generation)

    # --- answering

    def _asker_of(self, lease: Lease) -> _Asker | None:
        """Who waits for the answer, where it is still of use."""
        asker, now = self._askers.get(lease.service), self._leases.of(lease.service)
        is_his = asker is not None and asker.generation == lease.generation
        is_loading = now is not None and now.standing is Standing.LOADING
        if not is_his or not is_loading or now is None or now.generation != lease.generation:
            return None
        del self._askers[lease.service]
        return asker if asker is not None and not asker.answer.done() else None

    def _refuse(self, lease: Lease, error: LlmsupError, free_bytes: int | None) -> None:
        asker = self._asker_of(lease)
        if asker is None:
            return
        self._change(self._leases.gone(lease.service, self._now()))
        if isinstance(error, NoRoomError) and not error.permanent and free_bytes is not None:
            self._refused[lease.service] = free_bytes
        asker.answer.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        """A bug of ours must not keep services waiting for ever: each tells it, and tries again."""
        for name, asker in list(self._askers.items()):
            del self._askers[name]
            self._change(self._leases.gone(name, self._now()))
            if not asker.answer.done():
                words = f"no plan could be made: {type(error).__name__}: {error}"
                asker.answer.set_exception(LaunchError(words, shortage=True))

    def _retry_refused(self, free_bytes: int) -> None:
        for service, was_free_bytes in list(self._refused.items()):
            if free_bytes >= was_free_bytes + ROOM_MIN_BYTES:
                del self._refused[service]
                self._retry(service)

    def _tell_placed(self, placement: Placement, generation: int, free_bytes: int | None) -> None:
        name = placement.service
        last = self._last_placed.get(name)
        shrunk = self._shrunk.get(name)
        self._refused.pop(name, None)
        self._bounds.pop(name, None)
        self._last_placed[name] = Placed(
            placement,
            generation,
            free_bytes,
            before=last.placement if last else None,
            ran_out=bool(shrunk and shrunk.steps),
        )
        self._on_placed(self._last_placed[name])

    def _say_no_card(self, reason: str) -> None:
        if reason != self._no_card:
            self._no_card = reason
            self._on_no_card(reason)

    # --- inside

    def _mend(self) -> None:
        """Leases whose process is not there any more, were a change ever missed."""
        services = self._services()
        for name, lease in self._leases.table.items():
            service = services[name]
            if service.generation != lease.generation or service.state not in ALIVE:
                self._change(self._leases.gone(name, self._now()))

    def _change(self, after: Leases) -> None:
        if after != self._leases:
            self._leases = after
            self._woken.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _planned(placement: Placement, free_bytes: int | None) -> str:
    layers = f"{placement.options.gpu_layers} of {placement.layers} layers"
    free = "" if free_bytes is None else f" of {_mib(free_bytes)} free"
    return f"{layers}, {_mib(placement.price.device_bytes)} planned{free}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def _empty(device: Device) -> Device:
    """The same card with nothing on it."""
    return replace(device, free_bytes=device.total_bytes, used_bytes=0)
