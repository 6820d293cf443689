"""Services that a request loads, and those that are unloaded when none comes for a while."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping

from llmsup.config.schema import Profile
from llmsup.config.units import duration
from llmsup.core import demand, idleness
from llmsup.core.demand import Answer
from llmsup.core.idleness import Activity
from llmsup.core.routing import Route
from llmsup.core.service import Service, State, Want
from llmsup.gateway import Gateway
from llmsup.host.journal import Journal
from llmsup.services.envoy_admin import Clusters
from llmsup.supervisor import Supervisor
from llmsup.swaps import Swaps
from llmsup.units import on_demand, ttls_s

log = logging.getLogger(__name__)

LOOKS_PER_TTL = 5
LOOK_PERIOD_MIN_S = 0.05
LOOK_PERIOD_MAX_S = 10.0


class OnDemand:
    """What the activator asks, and the watch over idle services.

    `services` as requests meet them; `expected`: those that a switch is about to bring up. `swaps`
    has those that a request swaps in.
    """

    def __init__(
        self,
        profile: Profile,
        supervisor: Supervisor,
        gateway: Gateway,
        journal: Journal,
        swaps: Swaps,
        *,
        services: Callable[[], Mapping[str, Service]],
        expected: Callable[[], Collection[str]],
    ) -> None:
        self._supervisor = supervisor
        self._gateway = gateway
        self._journal = journal
        self._names = on_demand(profile)
        self._ttls_s = ttls_s(profile)
        self._swaps = swaps
        self._services = services
        self._expected = expected
        self._activities: dict[str, Activity] = {}
        self._asleep: set[str] = set()  # unloaded because no request came

    def take(self, profile: Profile) -> None:
        """This profile is in force."""
        self._names = on_demand(profile)
        self._ttls_s = ttls_s(profile)
        self._swaps.take(profile)

    # --- for the activator

    def demand(self, route: Route) -> Answer:
        """What a request for the route gets now."""
        turns = self._swaps.turns
        return demand.answer(route, self._services(), self._names, self._expected(), turns)

    def load(self, service: str) -> None:
        """Want this service up."""
        self._journal.write("loaded", service=service, why="a request came")
        self._supervisor.start([service])

    def note_waiting(self) -> None:
        """The first request waits for the turn of some service."""
        self._swaps.wake()

    def is_confirmed(self, route: str) -> bool:
        """Whether Envoy has the list of the route as it is now."""
        return self._gateway.is_confirmed(route)

    # --- what is told of them

    def is_asleep(self, service: str) -> bool:
        """Whether it was unloaded because no request came."""
        return service in self._asleep

    def recall(self, asleep: Collection[str]) -> frozenset[str]:
        """Take over those that an earlier daemon unloaded. Returns the ones that stay so."""
        self._asleep.update(self._ttls_s.keys() & set(asleep))
        return frozenset(self._asleep)

    def is_cold(self, service: Service) -> bool:
        """Whether requests wait for it, as in `core.demand`."""
        is_brought_up = service.name in self._names or self._swaps.turns.get(service.name) == ""
        return is_brought_up and demand.is_cold(service)

    def status(self, route: Route) -> str:
        """What `/v1/models` says of the route."""
        return demand.status(self.demand(route), self._asleep)

    def why(self, service: Service) -> str:
        """Why it is down, where a request would load it; else empty."""
        turns = self._swaps.turns
        if service.name not in self._names | turns.keys() or service.want is Want.UP:
            return ""
        if why_not := turns.get(service.name):
            return why_not
        if service.name in self._asleep:
            idle_s = duration(self._ttls_s[service.name])
            return f"unloaded after {idle_s} without a request; the next one loads it"
        return "swapped in by a request" if service.name in turns else "loaded by the first request"

    def note_change(self, after: Service) -> None:
        """It is not asleep any more once it is wanted up."""
        if after.want is Want.UP:
            self._asleep.discard(after.name)
        self._swaps.wake()

    # --- the watch

    async def keep(self) -> None:
        """Unload what is idle, until cancelled."""
        if not self._ttls_s:
            return
        period_s = min(self._ttls_s.values()) / LOOKS_PER_TTL
        while True:
            await asyncio.sleep(min(max(period_s, LOOK_PERIOD_MIN_S), LOOK_PERIOD_MAX_S))
            clusters = await self._gateway.clusters()
            if clusters is not None and not self._expected():
                self._look(clusters, asyncio.get_running_loop().time())

    def _look(self, clusters: Clusters, now: float) -> None:
        for name, ttl_s in self._ttls_s.items():
            service = self._supervisor.services[name]
            if service.state is not State.READY:
                self._activities.pop(name, None)
                continue
            active, total = self._gateway.traffic(name, clusters)
            last, generation = self._activities.get(name), service.generation
            activity = idleness.observe(last, generation, active=active, total=total, now=now)
            self._activities[name] = activity
            if idleness.is_idle(activity, ttl_s, now):
                self._unload(name, ttl_s)

    def _unload(self, name: str, ttl_s: float) -> None:
        log.info("service=%s is unloaded after %s without a request", name, duration(ttl_s))
        self._journal.write("unloaded", service=name, why=f"no request for {duration(ttl_s)}")
        self._asleep.add(name)
        self._supervisor.stop([name])
