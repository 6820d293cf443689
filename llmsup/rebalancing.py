"""Has services change size as other programs take the card's memory or free it.

Each reading of the card becomes an observation, `core.rebalance` decides, and what it wants is a
drained restart: the plan of the next process is made of what is free then.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from llmsup.card_gate import CardGate
from llmsup.card_watch import CardWatch
from llmsup.config.schema import Rebalance
from llmsup.core import rebalance
from llmsup.core.device import Device
from llmsup.core.leases import Standing
from llmsup.core.plan import Demand
from llmsup.core.rebalance import Balance, Extent, Grow, Observation, Shrink, Tenant
from llmsup.core.routing import Route
from llmsup.core.service import Service, State, Want
from llmsup.errors import ModelFileError
from llmsup.host.journal import Journal
from llmsup.placing import Sizer
from llmsup.troubles import Troubles

log = logging.getLogger(__name__)

WATCH_CLOSELY_S = 1.1
"""While other programs press; the card is read at most once a second."""

PRESSURE = "other programs use memory of the card that should stay free"
SERVING = frozenset({State.READY, State.UNREADY})


@dataclass(frozen=True)
class Change:
    """A change of size. `layers_after` is None until the new process is placed."""

    service: str
    why: str
    layers_before: int
    layers_after: int | None = None

    @property
    def sentence(self) -> str:
        """What became of it, for a person."""
        return f"{self.layers_before} → {self.layers_after} layers on the card: {self.why}"


class Rebalancing:
    """The balance of one card.

    `users` are the services that may use it, `in_flight` tells how many requests of some routes one
    has, `is_busy` whether a restart goes on, and `restart` restarts one, drained.
    """

    def __init__(
        self,
        mode: Rebalance,
        card: CardWatch,
        gate: CardGate,
        *,
        sizer: Sizer,
        users: Collection[str],
        routes: tuple[Route, ...],
        services: Callable[[], Mapping[str, Service]],
        in_flight: Callable[[str, Collection[str]], Awaitable[int]],
        is_busy: Callable[[], bool],
        restart: Callable[[str], None],
        journal: Journal,
        troubles: Troubles,
    ) -> None:
        self._card = card
        self._gate = gate
        self._sizer = sizer
        self._users = users
        self._routes = routes
        self._services = services
        self._in_flight = in_flight
        self._is_busy = is_busy
        self._restart = restart
        self._journal = journal
        self._troubles = troubles
        self._balance = Balance(mode)
        self._change: Change | None = None  # the one that goes on
        self._changes: dict[str, tuple[int, Change]] = {}  # the last ones, and whose generation

    def why(self, service: str) -> str:
        """Why its process is of another size than the one before; empty where it is not."""
        generation, change = self._changes.get(service, (0, None))
        is_present = generation == self._services()[service].generation
        return change.sentence if change is not None and is_present else ""

    async def keep(self) -> None:
        """Watch each reading of the card until cancelled."""
        while True:
            reading = await self._card.next_reading()
            if isinstance(reading, Device):
                try:
                    await self._look(reading)
                except Exception:  # of one look; the next one may be spared
                    log.exception("the balance of the card could not be looked after")
            if self._balance.pressed_since is not None and not self._balance.is_told:
                await asyncio.sleep(WATCH_CLOSELY_S)
                self._card.ask()

    # --- looking

    async def _look(self, device: Device) -> None:
        now = asyncio.get_running_loop().time()
        seen = Observation(self._sizer.budget(device), (), self._is_settled())
        if seen.is_settled:
            self._note_change()
            if seen.is_pressed or (seen.is_roomy and self._balance.rebalance == "auto"):
                seen = replace(seen, tenants=await self._tenants(is_pressed=seen.is_pressed))
                seen = await self._with_possible(seen, device, now)
        if seen.is_settled and not self._is_settled():
            return  # somebody began something meanwhile: the next reading tells
        self._balance, actions = rebalance.step(self._balance, seen, now)
        for action in actions:
            self._perform(action, seen)

    def _is_settled(self) -> bool:
        leases = self._gate.leases
        if self._is_busy() or leases.returning is not None:
            return False
        return all(
            lease.standing is Standing.HELD and self._services()[name].state in SERVING
            for name, lease in leases.table.items()
        )

    async def _tenants(self, *, is_pressed: bool) -> tuple[Tenant, ...]:
        """Whoever has a place, in the order of placing."""
        tenants = []
        for lease in sorted(self._gate.leases.table.values(), key=lambda each: each.rank):
            demand = self._demand(lease.service)
            if lease.placement is None or demand is None:
                continue
            tenant = Tenant(
                lease.service,
                rebalance.extent(lease.placement.options, demand),
                lease.bytes,
                may_change=bool(demand.knobs) and not demand.pinned,
                may_pause=False,
            )
            if tenant.may_change and (is_pressed or not tenant.extent.is_whole):
                tenant = replace(tenant, may_pause=await self._may_pause(lease.service))
            tenants.append(tenant)
        return tuple(tenants)

    def _demand(self, service: str) -> Demand | None:
        """What it asks of the card; None where its model file cannot be read any more."""
        with suppress(ModelFileError):
            return self._sizer.demand(service)
        return None

    async def _may_pause(self, service: str) -> bool:
        """Whether nobody waits for it on a route that nobody else would answer meanwhile."""
        services = self._services()
        alone = {
            route.name
            for route in self._routes
            if service in route.services
            and not any(
                name != service and services[name].state is State.READY for name in route.services
            )
        }
        return not alone or await self._in_flight(service, alone) == 0

    async def _with_possible(self, seen: Observation, device: Device, now: float) -> Observation:
        """What each could have now, of those who may grow; nobody while one has yet to come."""
        services = [self._services()[name] for name in self._users]
        if any(each.want is Want.UP and each.state is not State.READY for each in services):
            return seen
        names = {tenant.service for tenant in rebalance.growing(self._balance, seen, now)}
        tenants = tuple(
            [
                replace(tenant, possible=await self._possible(tenant, device))
                if tenant.service in names
                else tenant
                for tenant in seen.tenants
            ]
        )
        return replace(seen, tenants=tenants)

    async def _possible(self, tenant: Tenant, device: Device) -> Extent | None:
        placement = await self._gate.outlook(tenant.service, device)
        demand = self._demand(tenant.service)
        if placement is None or demand is None:
            return None
        return rebalance.extent(placement.options, demand)

    # --- doing

    def _perform(self, action: rebalance.Action, seen: Observation) -> None:
        free = f"{_mib(seen.budget.free_bytes)} of the card free"
        keep = f"{_mib(seen.keep_free_bytes)} should be"
        match action:
            case Shrink(service, by_bytes):
                lease = self._gate.lease(service)
                planned_bytes = 0 if lease is None else lease.planned_bytes
                self._gate.bound_next(service, max(0, planned_bytes - by_bytes))
                self._begin(service, f"other programs left {free}, {keep}", seen)
            case Grow(service):
                self._begin(service, f"other programs freed memory, {free}", seen)
            case rebalance.TellPressure(why):
                self._journal.write("rebalance", why=f"{free}, {keep}: {why}")
                self._troubles.tell(PRESSURE, f"{free}, {keep}: {why}")
            case rebalance.TellRelief():
                self._troubles.tell(PRESSURE, "")

    def _begin(self, service: str, why: str, seen: Observation) -> None:
        before = next(each for each in seen.tenants if each.service == service)
        self._change = Change(service, why, before.extent.layers)
        log.warning("service=%s is restarted in another size: %s", service, why)
        self._restart(service)

    def _note_change(self) -> None:
        """Tell what became of the change that went on; all is settled again."""
        change, self._change = self._change, None
        if change is None:
            return
        lease, demand = self._gate.lease(change.service), self._demand(change.service)
        if lease is None or lease.placement is None or demand is None:
            return
        after = rebalance.extent(lease.placement.options, demand).layers
        done = replace(change, layers_after=after)
        self._changes[done.service] = (lease.generation, done)
        self._journal.write(
            "rebalance",
            service=done.service,
            layers_before=done.layers_before,
            layers_after=after,
            why=done.sentence,
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"
