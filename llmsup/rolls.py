"""Rolling restarts: new processes for several services, one after another. One roll at a time."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextlib import suppress

from llmsup.core.service import Want
from llmsup.errors import LlmsupError
from llmsup.supervisor import Supervisor

log = logging.getLogger(__name__)

Keep = Callable[[Coroutine[object, object, None]], asyncio.Task[None]]
"""Has the work done in a task of its own, whose exceptions are logged."""


class Rolls:
    """The roll that goes on, if any, and those that are due.

    `outdated` are the services that were started otherwise than they would be now. Those that
    `leave_together` all end before the first of them comes back: for the room that they leave.
    """

    def __init__(self, supervisor: Supervisor, keep: Keep) -> None:
        self._supervisor = supervisor
        self._keep = keep
        self._roll: asyncio.Task[None] | None = None
        self._is_replacing = False
        self.outdated: frozenset[str] = frozenset()
        self._together: dict[str, int] = {}  # and the generations that are to end

    def leave_together(self, names: Iterable[str]) -> None:
        """These of the outdated ones."""
        services = self._supervisor.services
        self._together = {name: services[name].generation for name in names}

    @property
    def leaving(self) -> tuple[str, ...]:
        """Those of them whose processes have not ended yet."""
        services = self._supervisor.services if self._together else {}
        return tuple(
            name
            for name, generation in self._together.items()
            if services[name].generation == generation and services[name].pid is not None
        )

    def is_leaving(self, pid: int) -> bool:
        """Whether it is the process of one of them."""
        return any(self._supervisor.services[name].pid == pid for name in self.leaving)

    @property
    def pending(self) -> list[str]:
        """The services that a roll has yet to come to."""
        return sorted(self.outdated) or list(self._supervisor.restarting)

    def restart(self, names: Iterable[str], *, drain: bool = True) -> None:
        """Restart these, and then what a roll would still have come to."""
        chosen = tuple(names)
        rest = {*self.outdated, *self._supervisor.restarting[1:]}.difference(chosen, self.leaving)
        self.cancel()
        self._begin(self._restart_first(chosen, drain, rest))

    def replace_outdated(self) -> None:
        """Restart what is outdated; once, for there is nothing that makes more of it so."""
        if self.outdated and not self._is_replacing:
            self._is_replacing = True
            log.info("restarting %s: the launch has changed", ", ".join(sorted(self.outdated)))
            self._begin(self._replace_outdated())

    def renew(self, names: Collection[str]) -> None:
        """Restart these and what a roll would still come to, whichever of them become ready."""
        all_names = {*names, *self.outdated, *self._supervisor.restarting}
        self.cancel()
        self._begin(self._renew(all_names))

    def cancel(self) -> None:
        """End the roll."""
        if self._roll is not None:
            self._roll.cancel()
            self.outdated = frozenset()

    def _begin(self, roll: Coroutine[object, object, None]) -> None:
        for name in self.leaving:  # always first: others may wait for the room
            self._supervisor.restart(name)
        self._roll = self._keep(roll)

    async def _restart_first(
        self, names: Iterable[str], drain: bool, rest: Collection[str]
    ) -> None:
        await self._restart(names, drain=drain)
        await self._restart(rest)

    async def _replace_outdated(self) -> None:
        # Nobody sees a moment in which they are neither outdated nor being restarted.
        outdated, self.outdated = self.outdated, frozenset()
        await self._restart(outdated.difference(self._together))

    async def _restart(self, names: Iterable[str], *, drain: bool = True) -> None:
        with suppress(LlmsupError):  # a succession that failed has been said, and ends the roll
            await self._supervisor.restart_in_order(names, drain=drain)

    async def _renew(self, names: Collection[str]) -> None:
        for name in self._supervisor.start_order:
            if name in names and self._supervisor.services[name].want is Want.UP:
                await self._restart([name])
