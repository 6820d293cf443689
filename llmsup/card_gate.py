"""Lets one service after another onto the card, each with a plan made of what is free just then.

`core.leases` decides whose turn it is; here the card is read, the plan is made in a thread, and
what a load really took is found out. Where a service finds no room, others may leave for it.
Leases follow the states of services (`note_change`), so no turn outlives its process. One task
decides (`keep`); whoever asks gets a future.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from llmsup.card_queue import CardQueue, Evicting
from llmsup.core import leases
from llmsup.core.device import Absence, Device, NoDevice, Reading
from llmsup.core.eviction import Decision, Wait
from llmsup.core.grant import Grant
from llmsup.core.leases import Lease, Leases, Rank, Standing
from llmsup.core.plan import Placement
from llmsup.core.service import ALIVE, Service, State, Want
from llmsup.errors import LaunchError, LlmsupError, NoRoomError
from llmsup.placing import Placed, Placing

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


@dataclass
class _Asker:
    generation: int
    answer: asyncio.Future[Grant] = field(repr=False)


async def _never(_service: str) -> bool:
    return False


class CardGate:
    """The card of one stack.

    `read` reads it; `users` are the services that may use it, with their ranks; `services` has
    all of them as they are. `eviction` has services leave for others. `leaving` names those of an
    earlier daemon that are being ended, and may be on the card. `is_loading`: whether a service
    that is ready still fills the card.
    `short_bytes` tells how much was missing, from the output of a process that ran out of memory.
    `on_placed` is told of each plan, `on_measured` of what a load took, and `on_no_card` once why
    there is none. `retry` has a service tried again that was refused, and `renew` services
    restarted that were placed without a card, now that there is one.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Reading]],
        placing: Placing,
        users: Mapping[str, Rank],
        services: Callable[[], Mapping[str, Service]],
        *,
        eviction: Evicting | None = None,
        leaving: Callable[[], Sequence[str]] = lambda: (),
        is_loading: Callable[[str], Awaitable[bool]] = _never,
        short_bytes: Callable[[Sequence[str], Lease], int | None] = lambda *_: None,
        on_placed: Callable[[Placed], None] = lambda _: None,
        on_measured: Callable[[Lease], None] = lambda _: None,
        on_no_card: Callable[[str], None] = lambda _: None,
        retry: Callable[[str], None] = lambda _: None,
        renew: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> None:
        self._read = read
        self._placing = placing
        self._users = users
        self._services = services
        self._eviction = eviction
        self._leaving = leaving
        self._is_loading = is_loading
        self._short_bytes = short_bytes
        self._on_placed = on_placed
        self._on_measured = on_measured
        self._on_no_card = on_no_card
        self._retry = retry
        self._renew = renew
        self._leases = leases.NOTHING
        self._askers: dict[str, _Asker] = {}
        self._last_placed: dict[str, Placed] = {}
        self._ended: dict[str, Lease] = {}
        self._bounds: dict[str, int] = {}  # of the next plan, and only of that
        self._refused: dict[str, int] = {}  # what was free at that time
        self._queue = CardQueue()
        self._no_card = ""
        self._cardless: dict[str, int] = {}  # generations that were placed without a card
        self._device: Device | None = None  # as it was read last, however long ago
        self._counted_bytes = 0  # what our services had of it then
        self._reading = asyncio.Lock()
        self._woken = asyncio.Event()

    @property
    def leases(self) -> Leases:
        """Who has what of it, and who waits."""
        return self._leases

    @property
    def card(self) -> Reading:
        """It as it was read last; of a driver that fails since, as it was before."""
        return self._device or NoDevice(Absence.SILENT, "it was never read")

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
            self._counted_bytes = self._leases.held_bytes
            self._retry_refused(reading.free_bytes)
            self._renew_cardless()
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
        if leaving := self._leaving():
            return f"waits for {', '.join(leaving)} to end"
        reason = self._queue.why(service) or self._leases.why(service)
        return reason or "waits for the card to be read"

    def recall(self, service: str, written: str) -> tuple[Grant, bool]:
        """What a live process was given, and whether it could be given it now."""
        return self._placing.recall(service, written, self._device)

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
            if not grant.device:
                self._cardless[service] = generation

    def succeed(
        self, service: str, generation: int, grant: Grant, measured_bytes: int | None
    ) -> None:
        """A process that was placed and loaded beside the one of a service took its place."""
        if service not in self._users:
            return
        self.adopt(service, generation, grant, measured_bytes)
        self._change(self._leases.loaded(service))
        lease = self._leases.of(service)
        if lease is not None and measured_bytes:
            self._on_measured(lease)

    def forget(self, service: str) -> None:
        """What is known of its loads was of another model."""
        self._placing.forget(service)
        self._refused.pop(service, None)
        self._bounds.pop(service, None)

    def note_change(self, _before: Service, after: Service) -> None:
        """A service is another one now; to be told of every change."""
        if after.want is Want.DOWN:
            self._bounds.pop(after.name, None)
            self._queue.drop(after.name)
        lease = self._leases.of(after.name)
        if lease is None:
            return
        if after.generation != lease.generation or after.state not in ALIVE:
            self._ended[after.name] = lease
            self._change(self._leases.gone(after.name, self._now()))
            self._queue.look_again(self._now())
        elif after.state is State.STOPPING:
            self._change(self._leases.told_to_end(after.name, self._now()))
        elif after.state is State.READY and lease.standing is Standing.LOADING:
            self._placing.note_loaded(after.name)
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
        return self._placing.note_out_of_memory(lease, lease.placement, short_bytes)

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
            return await asyncio.to_thread(self._placing.place, service, (), without)
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
        if not self._leases.waiting or self._leases.is_taken or self._leaving():
            return
        is_coming = self._leases.returning is not None
        if self._queue.is_being_made(self._leases) or not (is_coming or self._next_up()):
            return
        reading, is_sure = await self._read_in_earnest()
        due = None if self._leases.next_up is None else self._next_up()
        if due is not None:
            await self._grant(due, reading, is_sure=is_sure)

    def _next_up(self) -> Lease | None:
        return self._queue.next_up(self._leases, self._now())

    async def _read_in_earnest(self) -> tuple[Reading, bool]:
        """The card, or why there is none; for a driver that only fails now, what it must be like.

        And whether that is sure.
        """
        give_up_at = self._now() + READING_PATIENCE_S
        while True:
            reading = await self.read()
            if isinstance(reading, Device) or reading.absence not in MAY_PASS:
                return reading, True
            if self._now() >= give_up_at:
                return (self._reckoned(self._device), False) if self._device else (reading, True)
            await asyncio.sleep(READING_RETRY_S)

    def _reckoned(self, last: Device) -> Device:
        """The card as it was read last, but for what our services took and gave back since."""
        free_bytes = last.free_bytes + self._counted_bytes - self._leases.held_bytes
        return replace(last, free_bytes=min(max(0, free_bytes), last.total_bytes))

    async def _grant(self, lease: Lease, reading: Reading, *, is_sure: bool) -> None:
        name = lease.service
        free_bytes = reading.free_bytes if isinstance(reading, Device) else None
        self._change(self._leases.granted(name, free_bytes, is_sure=is_sure))
        others = [each for each in self._users if each != name and self._is_to_come(each)]
        if name in self._queue:
            others = self._lasting(others)
        try:
            placement = await asyncio.to_thread(
                self._placing.place, name, others, reading, self._bounds.get(name)
            )
        except LlmsupError as error:
            if not await self._is_put_off(lease, error, others, reading):
                self._refuse(lease, error, free_bytes)
            return
        self._queue.drop(name)
        asker = self._asker_of(lease)
        if asker is None:
            return  # stopped meanwhile
        if placement is not None:
            self._change(self._leases.placed(name, placement))
        # Before anybody is told, who might break: a turn without an answer would never end.
        asker.answer.set_result(Grant(placement, device_of(reading), self._placing.shrunk(name)))
        if isinstance(reading, NoDevice):
            self._cardless[name] = lease.generation
        self._say_no_card(reading.reason if isinstance(reading, NoDevice) else "")
        if placement is not None:
            self._tell_placed(placement, lease.generation, free_bytes)

    async def _is_put_off(
        self, lease: Lease, error: LlmsupError, others: Sequence[str], reading: Reading
    ) -> bool:
        """Whether there will be room for one that found none, since others leave for it."""
        name = lease.service
        is_room = isinstance(error, NoRoomError) and not error.permanent
        if not is_room or self._eviction is None or isinstance(reading, NoDevice):
            return False
        lasting, bound_bytes = self._lasting(others), self._bounds.get(name)

        def fits(coming_bytes: int) -> bool:
            free_bytes = min(reading.free_bytes + coming_bytes, reading.total_bytes)
            then = replace(reading, free_bytes=free_bytes)
            try:
                self._placing.place(name, lasting, then, bound_bytes)
            except LlmsupError:
                return False
            return True

        decision: Decision | None = None
        if self._eviction.may_leave(name) and await asyncio.to_thread(fits, 0):
            # It was kept for one that would leave itself: who is there comes first.
            decision = Wait(self._now(), ())
        else:
            decision = await self._eviction.decide(name, fits)
        now = self._leases.of(name)
        is_its = now is not None and now.generation == lease.generation
        if decision is None or now is None or not is_its or now.standing is not Standing.LOADING:
            return False
        self._change(self._leases.put_off(name))
        behind_until = self._queue.behind_until(name, self._leases)
        if isinstance(decision, Wait):
            self._queue.put_off(name, decision.until, is_sure=decision.is_sure)
        elif behind_until is not None:
            self._queue.put_off(name, behind_until, is_sure=True)
        else:
            table = self._leases.table
            leaving = {each: table[each].generation for each in decision.services if each in table}
            self._queue.promise(name, leaving, self._now())
            self._eviction.evict(decision.services, name)
        return True

    def _lasting(self, services: Sequence[str]) -> list[str]:
        """Those of them that would not leave for others."""
        eviction = self._eviction
        return [each for each in services if eviction is None or not eviction.may_leave(each)]

    def _is_to_come(self, service: str) -> bool:
        """Whether it is wanted, and will ask for its part of the card."""
        services = self._services()

        def is_hoped_for(name: str) -> bool:
            now = services[name]
            may_come = now.want is Want.UP and now.state is not State.FAILED
            return may_come and all(map(is_hoped_for, now.missing))

        return is_hoped_for(service) and not self._leases.holds(service)

    async def _settle(self, lease: Lease) -> None:
        while await self._is_loading(lease.service):
            if self._is_over(lease):
                return
            await asyncio.sleep(SETTLE_LOOK_S)
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
        self._queue.drop(lease.service)
        if isinstance(error, NoRoomError) and not error.permanent and free_bytes is not None:
            self._refused[lease.service] = free_bytes
        asker.answer.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        """A bug of ours must not keep services waiting for ever: each tells it, and tries again."""
        for name, asker in list(self._askers.items()):
            del self._askers[name]
            self._change(self._leases.gone(name, self._now()))
            self._queue.drop(name)
            if not asker.answer.done():
                words = f"no plan could be made: {type(error).__name__}: {error}"
                asker.answer.set_exception(LaunchError(words, shortage=True))

    def _retry_refused(self, free_bytes: int) -> None:
        for service, was_free_bytes in list(self._refused.items()):
            if free_bytes >= was_free_bytes + ROOM_MIN_BYTES:
                del self._refused[service]
                self._retry(service)

    def _renew_cardless(self) -> None:
        services = self._services()
        names = [
            name
            for name, generation in self._cardless.items()
            if (services[name].generation, services[name].want) == (generation, Want.UP)
            and services[name].state in ALIVE
        ]
        self._cardless.clear()
        if names:
            self._renew(names)

    def _tell_placed(self, placement: Placement, generation: int, free_bytes: int | None) -> None:
        name = placement.service
        last = self._last_placed.get(name)
        self._refused.pop(name, None)
        self._bounds.pop(name, None)
        self._last_placed[name] = Placed(
            placement,
            generation,
            free_bytes,
            before=last.placement if last else None,
            ran_out=self._placing.ran_out(name),
        )
        self._on_placed(self._last_placed[name])

    def _say_no_card(self, reason: str) -> None:
        if reason != self._no_card:
            self._no_card = reason
            if reason:
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


def device_of(reading: Reading) -> str | None:
    """The card to use, none where the profile's is not there: not any other one instead."""
    if isinstance(reading, Device):
        return reading.uuid
    return "" if reading.absence is Absence.NO_DEVICE else None
