"""A server that gets ready beside the one of its service, to take its place.

It has a keeper of its own that nobody else knows, so it is started, probed and explained as any
other; but it dies only once, and it is given what was found free for it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from msgspec import structs

from llmsup.attendance import Unit
from llmsup.core.events import StartAsked, StopAsked
from llmsup.core.grant import UNPLANNED, Grant
from llmsup.core.service import Service
from llmsup.host.memory import Remembered
from llmsup.inquest import OnDeath
from llmsup.keeper import Change, Keeper, Running
from llmsup.room import Beside
from llmsup.troubles import Troubles
from llmsup.warmth import Warmth


class Understudy:
    """One such server: generation `generation` of the service of `unit`.

    `grant`: what it has of the card. `on_change` and `on_death` are told of it as of any service.
    """

    def __init__(
        self,
        unit: Unit,
        generation: int,
        grant: Grant,
        *,
        on_change: Change,
        on_death: OnDeath,
        warmth: Warmth,
        troubles: Troubles,
    ) -> None:
        self.unit = unit
        self._changed = asyncio.Event()
        self._on_change = on_change
        once = structs.replace(unit.policy.restart, policy="never")
        self._keeper = Keeper(
            replace(unit, policy=replace(unit.policy, restart=once), depends_on=()),
            Remembered(asked="", generation=generation - 1, restarts=0),
            on_change=self._note_change,
            on_death=on_death,
            drain_requests=_drained,
            warmth=warmth,
            troubles=troubles,
            is_leaving=lambda _: False,
            card=_Granted(grant),
        )

    @property
    def service(self) -> Service:
        """It as it is."""
        return self._keeper.service

    @property
    def port(self) -> int | None:
        """Where it listens."""
        return self._keeper.port

    def start(self) -> None:
        """Begin."""
        self._keeper.post(StartAsked())

    def yield_place(self) -> Running | None:
        """Let go of it, so that it takes its place; None where it has ended."""
        return self._keeper.disown()

    async def end(self) -> None:
        """End it: nobody has met it."""
        self._keeper.post(StopAsked(drain=False))
        while not self.service.is_down:
            self._changed.clear()
            await self._changed.wait()
        await self._keeper.wait_swept()

    def _note_change(self, before: Service, after: Service) -> None:
        self._changed.set()
        self._on_change(before, after)


class _Granted:
    """The card for one that was told beforehand what it may have."""

    def __init__(self, grant: Grant) -> None:
        self._grant = grant

    def ask(self, _service: str, _generation: int) -> asyncio.Future[Grant]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self._grant)
        return answer

    def why(self, _service: str) -> str:
        return ""

    def recall(self, _service: str, _written: str) -> tuple[Grant, bool]:
        return UNPLANNED, True

    def adopt(self, *_: object) -> None:
        pass

    def note_out_of_memory(self, _service: str, _lines: Sequence[str]) -> tuple[str, bool]:
        return "", False


async def _drained(_service: str) -> None:
    pass


Enter = Callable[[Unit, int, Beside], Understudy]
"""Makes one for a generation of a unit that fits so."""
