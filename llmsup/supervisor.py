"""Keeps all services: who waits for whom, and in which order they stop."""

import asyncio
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from graphlib import TopologicalSorter

from llmsup.attendance import Unit
from llmsup.card_use import CardUse
from llmsup.core.events import DependenciesChanged, RestartAsked, StartAsked, StopAsked
from llmsup.core.service import ALIVE, Service, State, Want
from llmsup.host.memory import Remembered
from llmsup.inquest import OnDeath
from llmsup.keeper import Change, DrainRequests, IsLeaving, Keeper
from llmsup.troubles import Troubles
from llmsup.warmth import Warmth

Succeed = Callable[[str], Awaitable[bool]]
"""Replaces the process of a service by one started beside it; False where that is not possible.

Raises LlmsupError where it was tried in vain, and the old process goes on.
"""


class Supervisor:
    """The services of one stack, each with its keeper.

    `on_change(before, after)` is told of every changed Service, on the event loop; `on_death` of
    each death, after what follows it.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        remembered: Mapping[str, Remembered],
        *,
        on_change: Change,
        on_death: OnDeath,
        drain_requests: DrainRequests,
        warmth: Warmth,
        troubles: Troubles,
        is_leaving: IsLeaving,
        card: CardUse,
        succeed: Succeed,
    ) -> None:
        self._on_change = on_change
        self._succeed = succeed
        self._changed = asyncio.Event()
        self.restarting: list[str] = []
        self.keepers = {
            unit.name: Keeper(
                unit,
                remembered.get(unit.name),
                on_change=self._note_change,
                on_death=on_death,
                drain_requests=drain_requests,
                warmth=warmth,
                troubles=troubles,
                is_leaving=is_leaving,
                card=card,
            )
            for unit in units
        }
        self._dependents: dict[str, list[str]] = {name: [] for name in self.keepers}
        for name, keeper in self.keepers.items():
            for dependency in keeper.unit.depends_on:
                self._dependents[dependency].append(name)
        for name in self.keepers:
            self._tell_missing(name)

    @property
    def services(self) -> Mapping[str, Service]:
        """Every service as it is now, by name, in the order of the profile."""
        return {name: keeper.service for name, keeper in self.keepers.items()}

    @property
    def start_order(self) -> tuple[str, ...]:
        """All names, dependencies before their dependents."""
        graph = {name: keeper.unit.depends_on for name, keeper in self.keepers.items()}
        return tuple(TopologicalSorter(graph).static_order())

    def start(self, names: Iterable[str], *, forgive: bool = True) -> None:
        """Want these up; dependencies are awaited by their keepers."""
        for name in names:
            self.keepers[name].post(StartAsked(forgive))

    def stop(self, names: Iterable[str], *, drain: bool = True) -> None:
        """Want these down."""
        for name in names:
            self.keepers[name].post(StopAsked(drain))

    def restart(self, name: str, *, drain: bool = True) -> None:
        """Want a new process of this one."""
        self.keepers[name].post(RestartAsked(drain))

    async def stop_in_order(self, names: Iterable[str], *, drain: bool = True) -> None:
        """Stop these, each once its dependents are gone; return when all are stopped.

        One that somebody wants up again meanwhile is not waited for.
        """
        remaining = set(names)
        asked: set[str] = set()
        while remaining:
            for name in remaining - asked:
                if not remaining.intersection(self._dependents[name]):
                    asked.add(name)
                    self.stop([name], drain=drain)
            done = {name for name in remaining & asked if self._is_past_stopping(name)}
            remaining -= done
            if remaining and not done:
                await self._next_change()
        await asyncio.gather(*(keeper.wait_swept() for keeper in self.keepers.values()))

    async def restart_in_order(self, names: Iterable[str], *, drain: bool = True) -> None:
        """Restart these one after another, each once the one before is ready.

        The roll ends at one that does not become ready: the others are left as they are. One that
        somebody stopped meanwhile is passed over. `restarting` names those still to come.
        """
        chosen = set(names)
        up = {name for name in chosen if self.keepers[name].service.want is Want.UP}
        self.restarting = [name for name in self.start_order if name in chosen]
        try:
            while self.restarting:
                name = self.restarting[0]
                service = self.keepers[name].service
                if not self._was_stopped(name, up):
                    is_replaced = drain and await self._succeed(name)
                    if not is_replaced and not self._was_stopped(name, up):
                        self.restart(name, drain=drain)
                        while not self._is_settled(name, service.generation):
                            await self._next_change()
                    if not self._has_restarted(name):
                        return
                del self.restarting[0]
        finally:
            self.restarting = []

    def _was_stopped(self, name: str, up: Container[str]) -> bool:
        return name in up and self.keepers[name].service.want is Want.DOWN

    def _is_past_stopping(self, name: str) -> bool:
        service = self.keepers[name].service
        return service.is_down or service.want is Want.UP

    def _is_settled(self, name: str, last_generation: int) -> bool:
        service = self.keepers[name].service
        if service.want is Want.DOWN or service.state not in ALIVE:
            return True
        is_started = service.state in {State.READY, State.UNREADY}
        return is_started and service.generation > last_generation

    def _has_restarted(self, name: str) -> bool:
        service = self.keepers[name].service
        return service.want is Want.DOWN or service.state is State.READY

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _note_change(self, before: Service, after: Service) -> None:
        self._on_change(before, after)
        self._changed.set()
        if (before.state is State.READY) != (after.state is State.READY):
            for name in self._dependents[after.name]:
                self._tell_missing(name)

    def _tell_missing(self, name: str) -> None:
        keeper = self.keepers[name]
        missing = tuple(
            dependency
            for dependency in keeper.unit.depends_on
            if self.keepers[dependency].service.state is not State.READY
        )
        if missing != keeper.service.missing:
            keeper.post(DependenciesChanged(missing))
