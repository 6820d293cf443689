"""Models on probation: their servers get no requests before they have proved themselves."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llmsup.choosing import Chosen
from llmsup.config.schema import LlamaServer, Profile
from llmsup.core.service import State
from llmsup.host.model_server import served_model, token_fault
from llmsup.supervisor import Supervisor

log = logging.getLogger(__name__)

FOREVER = 2**63
_UP = frozenset({State.READY, State.UNREADY})


class Proving:
    """Those of one profile. `withheld` are the generations that get no requests.

    `publish` has the upstream lists follow it, and `tell` is told of each server that was asked.
    """

    def __init__(
        self,
        profile: Profile,
        supervisor: Supervisor,
        chosen: Chosen,
        *,
        withheld: dict[str, range],
        publish: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        self._profile = profile
        self._supervisor = supervisor
        self._chosen = chosen
        self._withheld = withheld
        self._publish = publish
        self._tell = tell
        self._last: dict[str, int] = {}
        self._asked: dict[str, asyncio.Task[str]] = {}

    def begin(self, last: Mapping[str, int], *, are_known: bool) -> None:
        """Withhold services with a model, whose last generations before are these.

        `are_known`: the generations after them need not be asked.
        """
        self._last = dict(last)
        for name, generation in last.items():
            self._withheld[name] = range(generation + 1 if are_known else FOREVER)

    def end(self) -> None:
        """Withhold none any more."""
        self._let_in(self._last)

    def look(self) -> None:
        """Ask the servers that are up by now."""
        for name in self._last.keys() - self._asked.keys():
            service = self._supervisor.services[name]
            if self._is_up(name):
                self._note_load(name, time.monotonic() - service.started_at)
                self._asked[name] = asyncio.create_task(self._ask(name))

    @property
    def faults(self) -> dict[str, str | None]:
        """What is wrong with each: empty for nothing, None where that is not known yet."""
        return {
            name: task.result() if (task := self._asked.get(name)) and task.done() else None
            for name in self._last
        }

    @property
    def loading(self) -> str | None:
        """The one that loads just now, or the next; None where all are up."""
        services = self._supervisor.services
        waiting = [name for name in self._last if not self._is_up(name)]
        return min(waiting, key=lambda name: services[name].pid is None, default=None)

    def model(self, name: str) -> Path:
        """The file that a service of the profile should serve."""
        spec = self._profile.service[name]
        return Path(spec.model if isinstance(spec, LlamaServer) else "")

    def _is_up(self, name: str) -> bool:
        service = self._supervisor.services[name]
        return service.generation > self._last[name] and service.state in _UP

    async def _ask(self, name: str) -> str:
        keeper, fault = self._supervisor.keepers[name], ""
        if keeper.port is not None:
            served = await served_model(keeper.port)
            if served and Path(served) != self.model(name):
                fault = f"it serves {served}"
            elif not keeper.warm_tokens:  # else it has generated, and a prompt would cool it
                fault = await token_fault(keeper.port)
        if not fault:
            self._let_in([name])
        self._tell()
        return fault

    def _let_in(self, names: Iterable[str]) -> None:
        for name in names:
            self._withheld.pop(name, None)
        self._publish()

    def _note_load(self, name: str, load_s: float) -> None:
        try:
            self._chosen.note_load(self.model(name), load_s)
        except OSError as error:
            log.warning("how long it took is not remembered: %s", error)
