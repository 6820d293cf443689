"""Whether a switch has room: once what runs has given way, and already beside it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llmsup.card_gate import CardGate, device_of
from llmsup.choosing import Change
from llmsup.config.schema import Profile
from llmsup.core import offload
from llmsup.core.device import Device, Reading
from llmsup.core.grant import Grant
from llmsup.core.leases import LEAST_SHARE
from llmsup.core.service import Service, State, Want
from llmsup.errors import NoRoomError
from llmsup.host import procfs
from llmsup.placing import Placing, Sizer

CALM_TIMEOUT_S = 60.0
LOOK_PERIOD_S = 0.05
HOST_RESERVE_BYTES = 512 * 2**20
HOST_RESERVE_SHARE = 0.05
"""So much memory of the machine stays free beside two models, whichever is more."""


@dataclass(frozen=True)
class Beside:
    """What a target gets beside what runs, with so much free on the card (None: no card)."""

    grant: Grant
    free_bytes: int | None

    def took_bytes(self, reading: Reading) -> int | None:
        """What its load took, now that it is done; None where that cannot be told."""
        placement = self.grant.placement
        if placement is None or self.free_bytes is None or not isinstance(reading, Device):
            return None
        took_bytes = self.free_bytes - reading.free_bytes
        least_bytes = LEAST_SHARE * placement.price.device_bytes
        return took_bytes if took_bytes > max(0, least_bytes) else None


class Room:
    """The room on the card and in the machine.

    `sizing_of` knows what the services of another profile ask of the card.
    """

    def __init__(
        self,
        gate: CardGate,
        services: Callable[[], Mapping[str, Service]],
        sizing_of: Callable[[Profile], Sizer],
    ) -> None:
        self._gate = gate
        self._services = services
        self._sizing_of = sizing_of

    async def wait_calm(self) -> None:
        """Until nothing comes or goes on the card, or that takes too long.

        No time is lost by it: whatever has to load next would wait for that, too.
        """
        deadline = time.monotonic() + CALM_TIMEOUT_S
        while not self._is_calm and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_PERIOD_S)
            await self._gate.read()

    @property
    def _is_calm(self) -> bool:
        leases = self._gate.leases
        # What is on its way down has its memory to the end.
        is_anybody_leaving = any(
            leases.holds(name) and service.want is Want.DOWN and not service.is_down
            for name, service in self._services().items()
        )
        is_loading = leases.is_taken or bool(leases.waiting)
        return not is_loading and leases.returning is None and not is_anybody_leaving

    async def look(self, change: Change) -> Beside | None:
        """What the target may have beside what runs; None where that has to give way first.

        It has to where the target would get less beside it. Raises NoRoomError where the target
        has no room even with it gone.
        """
        reading = await self._gate.read()
        placing = Placing(self._sizing_of(change.new.profile), offload.plan)
        freed = self._freed(change, reading)
        alone = await asyncio.to_thread(placing.place, change.target, (), freed)
        if alone is None or not self._is_calm or not self._may_stay(change):
            return None
        try:
            beside = await asyncio.to_thread(placing.place, change.target, (), reading)
        except NoRoomError:
            return None
        if beside is None or beside.options != alone.options:
            return None
        if not _has_host_memory(beside.price.estimate.host.total_bytes):
            return None
        free_bytes = reading.free_bytes if isinstance(reading, Device) else None
        return Beside(Grant(beside, device_of(reading)), free_bytes)

    def _may_stay(self, change: Change) -> bool:
        """Whether anything serves that could go on doing so, while the target has a port too."""
        services, profile = self._services(), change.new.profile
        serve = any(services[name].state is State.READY for name in change.generations)
        is_moved = change.target in change.generations
        needs_its_port = is_moved and getattr(profile.service[change.target], "port", None)
        return profile.switch == "auto" and serve and not needs_its_port

    def _freed(self, change: Change, reading: Reading) -> Reading:
        """The card as it is once what runs has given way."""
        if not isinstance(reading, Device):
            return reading
        leases = filter(None, map(self._gate.lease, change.generations))
        free_bytes = reading.free_bytes + sum(each.bytes for each in leases)
        return replace(reading, free_bytes=min(reading.total_bytes, free_bytes))


def _has_host_memory(needed_bytes: int) -> bool:
    total_bytes, available_bytes = procfs.machine_memory()
    reserve_bytes = max(HOST_RESERVE_BYTES, int(HOST_RESERVE_SHARE * total_bytes))
    return available_bytes >= needed_bytes + reserve_bytes
