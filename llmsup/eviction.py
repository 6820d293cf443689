"""Has services that a request loads leave the card for one without room; `core.eviction` decides.

They are drained and unloaded like one that is idle, and the next request loads them again.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from llmsup.core import eviction
from llmsup.core.eviction import Decision, Fits, Tenant
from llmsup.core.leases import Lease, Leases, Rank, Standing
from llmsup.core.service import Service, State, Want
from llmsup.on_demand import OnDemand

ON_THE_CARD = frozenset({Standing.HELD, Standing.LEAVING})
LEAVING = frozenset({State.DRAINING, State.STOPPING})
PINNED = 2**31
"""The priority of services that are pinned: above that of all others."""


class Eviction:
    """The room that services of one stack make for each other, of these `ranks`.

    `min_dwell_s`: how long each serves before it leaves.
    """

    def __init__(
        self,
        ranks: Mapping[str, Rank],
        min_dwell_s: float,
        *,
        leases: Callable[[], Leases],
        services: Callable[[], Mapping[str, Service]],
        on_demand: Callable[[], OnDemand],
    ) -> None:
        self._ranks = ranks
        self._min_dwell_s = min_dwell_s
        self._leases = leases
        self._services = services
        self._on_demand = on_demand
        self._clock = asyncio.get_running_loop().time

    def may_leave(self, service: str) -> bool:
        """Whether it would leave for others, so that nothing is kept for it."""
        is_unpinned, _, _ = self._ranks[service]
        return is_unpinned and self._on_demand().may_unload(service)

    async def decide(self, service: str, fits: Fits) -> Decision | None:
        """Who leaves for a service; None: nobody, it would be in vain. `fits` may take a while."""
        await self._on_demand().look()
        tenants = [
            self._tenant(lease)
            for lease in self._leases().table.values()
            if lease.service != service and lease.bytes and self._may_go(lease)
        ]
        if not tenants:
            return None
        priority, now = self._priority(service), self._clock()
        return await asyncio.to_thread(
            eviction.make_room, priority, tenants, fits, self._min_dwell_s, now
        )

    def evict(self, services: Sequence[str], service: str) -> None:
        """Have these leave for another one."""
        for name in services:
            self._on_demand().evict(name, service)

    def _may_go(self, lease: Lease) -> bool:
        """Whether it leaves anyway, or for others."""
        is_settled = lease.standing in ON_THE_CARD
        return is_settled and (self._is_leaving(lease.service) or self.may_leave(lease.service))

    def _tenant(self, lease: Lease) -> Tenant:
        name = lease.service
        since, used_at, is_busy = self._on_demand().use(name)
        return Tenant(
            name,
            self._priority(name),
            lease.bytes,
            since,
            used_at,
            is_busy=is_busy,
            is_leaving=self._is_leaving(name),
        )

    def _priority(self, service: str) -> int:
        is_unpinned, negative, _ = self._ranks[service]
        return -negative if is_unpinned else PINNED

    def _is_leaving(self, service: str) -> bool:
        now = self._services()[service]
        return now.want is Want.DOWN and now.state in LEAVING
