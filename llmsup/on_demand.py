"""Services that a request loads, and those that are unloaded when none comes for a while."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import inf

from llmsup.config.schema import Profile
from llmsup.config.units import duration
from llmsup.core import demand, idleness
from llmsup.core.demand import Answer
from llmsup.core.idleness import Activity
from llmsup.core.routing import Route
from llmsup.core.service import Service, State, Want
from llmsup.gateway import Gateway
from llmsup.host.journal import Journal
from llmsup.supervisor import Supervisor
from llmsup.swaps import Swaps
from llmsup.units import on_demand, takes_turns, ttls_s

log = logging.getLogger(__name__)

LOOKS_PER_TTL = 5
LOOK_PERIOD_MIN_S = 0.05
LOOK_PERIOD_MAX_S = 10.0
EVICTED = "to make room"


class OnDemand:
    """What the activator asks, and the watch over idle services.

    `services` as requests meet them; `expected`: those that a switch is about to bring up. `swaps`
    has those that a request swaps in. `is_unsettled`: whether no list is written yet.
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
        is_unsettled: Callable[[], bool],
    ) -> None:
        self._supervisor = supervisor
        self._gateway = gateway
        self._journal = journal
        self._names = on_demand(profile)
        self._takers = takes_turns(profile).keys()
        self._ttls_s = ttls_s(profile)
        self._swaps = swaps
        self._services = services
        self._expected = expected
        self._is_unsettled = is_unsettled
        self._clock = asyncio.get_running_loop().time
        self._activities: dict[str, Activity] = {}
        self._asleep: dict[str, str] = {}  # who was unloaded, and why

    def take(self, profile: Profile) -> None:
        """This profile is in force."""
        self._names = on_demand(profile)
        self._takers = takes_turns(profile).keys()
        self._ttls_s = ttls_s(profile)
        self._activities = {
            name: each for name, each in self._activities.items() if name in self._names
        }
        self._swaps.take(profile)

    # --- for the activator

    def demand(self, route: Route) -> Answer:
        """What a request for the route gets now."""
        expected = set(self._expected())
        if expected:
            # A switch of single mode knows what else was up when it began: it stays so to its end.
            expected |= self._names & self._takers
        found = demand.answer(route, self._services(), self._names, expected, self._swaps.turns)
        # A service that is ready is not on the lists yet.
        return demand.Hold() if isinstance(found, demand.Repeat) and self._is_unsettled() else found

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

    def asleep(self, service: str) -> str:
        """Why it is unloaded until a request comes, as `Remembered.asked` has it; empty if not."""
        why = self._asleep.get(service)
        if why is None:
            return ""
        return "evicted" if why.startswith(EVICTED) else "idle"

    def recall(self, asked: Mapping[str, str]) -> frozenset[str]:
        """Take over those that an earlier daemon unloaded. Returns the ones that stay so."""
        for name in self._names & asked.keys():
            if asked[name] == "idle" and name in self._ttls_s:
                self._asleep[name] = self._idle(name)
            elif asked[name] == "evicted":
                self._asleep[name] = EVICTED
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
            return f"unloaded {self._asleep[service.name]}; the next request loads it"
        return "swapped in by a request" if service.name in turns else "loaded by the first request"

    def note_change(self, after: Service) -> None:
        """It is not asleep any more once it is wanted up."""
        if after.want is Want.UP:
            self._asleep.pop(after.name, None)
        self._swaps.wake()

    # --- who leaves

    def may_unload(self, service: str) -> bool:
        """Whether a request would load it again, and no switch is about to bring it up."""
        return service in self._names and service not in self._expected()

    def use(self, service: str) -> tuple[float | None, float, bool]:
        """Since when it serves, when it was last used, and whether it is; as of the last look."""
        since, activity = self._swaps.since.get(service), self._activities.get(service)
        if activity is None:
            return since, since or 0.0, True
        return since, activity.at, activity.is_busy

    def evict(self, service: str, other: str) -> None:
        """Unload a service to make room for another one."""
        self._unload(service, f"{EVICTED} for {other}")

    # --- the watch

    async def keep(self) -> None:
        """Unload what is idle, until cancelled."""
        while True:
            period_s = min(self._ttls_s.values(), default=inf) / LOOKS_PER_TTL
            await asyncio.sleep(min(max(period_s, LOOK_PERIOD_MIN_S), LOOK_PERIOD_MAX_S))
            if self._names and await self.look() and not self._expected():
                self._unload_idle()

    async def look(self) -> bool:
        """Find out who is used. Returns whether Envoy told; else all count as busy."""
        clusters = await self._gateway.clusters()
        if clusters is None:
            for name, activity in self._activities.items():
                self._activities[name] = replace(activity, is_busy=True)
            return False
        now = self._clock()
        for name in self._names:
            service = self._supervisor.services[name]
            if service.state is not State.READY:
                self._activities.pop(name, None)
                continue
            active, total = self._gateway.traffic(name, clusters)
            last, generation = self._activities.get(name), service.generation
            self._activities[name] = idleness.observe(
                last, generation, active=active, total=total, now=now
            )
        return True

    def _unload_idle(self) -> None:
        now = self._clock()
        for name, ttl_s in self._ttls_s.items():
            activity = self._activities.get(name)
            if activity is not None and idleness.is_idle(activity, ttl_s, now):
                self._unload(name, self._idle(name))

    def _idle(self, service: str) -> str:
        return f"after {duration(self._ttls_s[service])} without a request"

    def _unload(self, service: str, why: str) -> None:
        log.info("service=%s is unloaded %s", service, why)
        self._journal.write("unloaded", service=service, why=why)
        self._asleep[service] = why
        self._supervisor.stop([service])
