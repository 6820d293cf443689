"""In single mode a request for a model that is not up has it swapped in; `core.turns` decides when.

A swap is a switch whose asker is a request. One that fails is told to those who wait for it, and
not tried again for a while.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from llmsup.config.schema import Profile
from llmsup.control.wire import SwitchResult
from llmsup.core import turns
from llmsup.core.service import Service, State, Want
from llmsup.core.turns import Present, Setback
from llmsup.errors import LlmsupError
from llmsup.host.journal import Journal
from llmsup.units import active, swappable

log = logging.getLogger(__name__)

NOT_COMING = frozenset({State.BACKOFF, State.FAILED, State.STOPPED})
"""The states in which one that is wanted up does not serve, and does not load either."""


class Swaps:
    """The turns of the models of one stack.

    `services` as requests meet them; `waiting`: those that requests wait for, in the order of the
    first of each. `is_busy`: whether a switch goes on. `begin` begins one to a service, and raises
    LlmsupError; what comes of it is the future's. `on_change` is told when `turns` changes.
    """

    def __init__(
        self,
        profile: Profile,
        journal: Journal,
        *,
        services: Callable[[], Mapping[str, Service]],
        waiting: Callable[[], Iterable[str]],
        is_busy: Callable[[], bool],
        begin: Callable[[str], asyncio.Future[SwitchResult]],
        on_change: Callable[[], None],
    ) -> None:
        self._profile = profile
        self._journal = journal
        self._services = services
        self._waiting = waiting
        self._is_busy = is_busy
        self._begin = begin
        self._on_change = on_change
        self._clock = asyncio.get_running_loop().time
        self.since: dict[str, float] = {}
        """Since when each service serves; see `serving_since`."""
        self._setbacks: dict[str, Setback] = {}  # the last one of each since it served
        self._held_off: set[str] = set()  # those of which it is not over
        self._woken = asyncio.Event()

    def take(self, profile: Profile) -> None:
        """This profile is in force."""
        self._profile = profile

    @property
    def turns(self) -> dict[str, str]:
        """The services that take turns, and why a request swaps none in just now; empty: it does.

        The active one is among them while it is wanted.
        """
        names = swappable(self._profile)
        present = self._services().get(active(self._profile))
        if names and present is not None and present.want is Want.UP:
            names |= {present.name}
        return {name: self._setbacks[name].why if name in self._held_off else "" for name in names}

    def wake(self) -> None:
        """Somebody waits, or a service is another one now."""
        self._woken.set()

    async def keep(self) -> None:
        """Begin what is due until cancelled."""
        while True:
            self._woken.clear()
            try:
                pause_s = self._go_on(self._clock())
            except Exception:
                log.exception("swaps could not be decided on")
                pause_s = None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()

    # --- inside

    def _go_on(self, now: float) -> float | None:
        """Begin what is due. Returns after how long to look again, if nothing changes before."""
        services = self._services()
        self.since = turns.serving_since(self.since, services.values(), now)
        present = self._present(services)
        if present is not None and present.since is not None:
            self._setbacks.pop(present.service, None)  # whoever brought it about, it serves
        self._end_setbacks(now)
        looks = [self._setbacks[name].until - now for name in self._held_off]
        open_turns = {name for name, why in self.turns.items() if not why}
        waiting = [name for name in self._waiting() if name in open_turns]
        turn = turns.next_turn(waiting, present, self._profile.min_dwell_s, now)
        if turn is not None and not self._is_busy():
            if turn.at > now:
                looks.append(turn.at - now)
            else:
                self._swap(turn.service)
        return min(looks, default=None)

    def _present(self, services: Mapping[str, Service]) -> Present | None:
        service = services.get(active(self._profile))
        if service is None or (service.want is Want.DOWN and service.is_down):
            return None  # on its way down it has its memory still
        since = self.since.get(service.name)
        return Present(service.name, since, is_failing=service.state in NOT_COMING)

    def _swap(self, name: str) -> None:
        log.info("service=%s is swapped in: a request waits for it", name)
        self._journal.write("swap", service=name, why="a request waits for it")
        try:
            result = self._begin(name)
        except LlmsupError as error:
            self._set_back(name, error.message)
            return
        result.add_done_callback(lambda done: self._note_end(name, done.result()))

    def _note_end(self, name: str, result: SwitchResult) -> None:
        if not result["success"]:
            self._set_back(name, result["message"])
        self.wake()

    def _set_back(self, name: str, why: str) -> None:
        setback = turns.set_back(self._setbacks.get(name), why, self._clock())
        log.warning("service=%s is not swapped in for %g s: %s", name, setback.delay_s, why)
        self._setbacks[name] = setback
        self._held_off.add(name)
        self._on_change()
        self.wake()

    def _end_setbacks(self, now: float) -> None:
        setbacks = self._setbacks
        over = {
            each for each in self._held_off if each not in setbacks or setbacks[each].until <= now
        }
        if over:
            self._held_off -= over
            self._on_change()
