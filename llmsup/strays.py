"""Processes that nothing keeps any more, ended once what they are answering is answered.

The gateway must no longer send them requests by then. Envoy forgets the requests of an upstream
that is off the lists, so what is looked at are connections: it closes those that are idle.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from llmsup.host import ports
from llmsup.host.process import carries_mark, end_marked, marked

log = logging.getLogger(__name__)

GRACE_S = 10.0
LOOK_PERIOD_S = 0.05


AtLast = Callable[[str], Awaitable[None]]
"""What is to be done with the processes of a mark before they are ended."""


class Strays:
    """What an earlier daemon started and this one does not keep, by the marks of generations."""

    def __init__(self) -> None:
        self._left: set[str] = set()
        self._card_users: dict[str, str] = {}
        self._told: set[str] = set()

    def note(self, marks: Iterable[str], card_users: Mapping[str, str]) -> None:
        """These are to be ended; `card_users`: the services, by marks, that may be on the card."""
        self._left |= set(marks)
        self._card_users |= card_users

    @property
    def card_users(self) -> tuple[str, ...]:
        """The services whose processes may have memory of the card, and are not ended yet."""
        return tuple({name: 0 for mark, name in self._card_users.items() if mark in self._left})

    def has(self, pid: int) -> bool:
        """Whether the process is one of them. They are ended within a while."""
        return any(carries_mark(pid, mark) for mark in self._left)

    @property
    def are_ending(self) -> bool:
        """Whether some were told to end, and have not ended yet."""
        return bool(self._told)

    async def end(
        self,
        marks: Iterable[str],
        patience_s: Callable[[str], float],
        at_last: AtLast | None = None,
    ) -> None:
        """End these. `patience_s(mark)`: how long their clients are waited for, in seconds.

        `at_last(mark)` is done once that is over.
        """
        async with asyncio.TaskGroup() as group:
            for mark in sorted(marks):
                group.create_task(self._end(mark, patience_s(mark), at_last))

    async def _end(self, mark: str, patience_s: float, at_last: AtLast | None) -> None:
        try:
            log.info("ending what is left of %s", mark)
            await _wait_unused(mark, patience_s)
            if at_last is not None:
                await at_last(mark)
            self._told.add(mark)
            await asyncio.to_thread(end_marked, mark, GRACE_S)
        except Exception:
            log.exception("what is left of %s could not be ended", mark)
        finally:
            self._left.discard(mark)
            self._told.discard(mark)


async def _wait_unused(mark: str, patience_s: float) -> None:
    """Until nobody is connected to a port that processes with this mark listen on."""
    deadline = time.monotonic() + patience_s
    theirs = await asyncio.to_thread(ports.listened_to, marked(mark))
    while theirs and ports.is_connected_to(theirs):
        if time.monotonic() >= deadline:
            log.warning("%s still has clients after %g s", mark, patience_s)
            return
        await asyncio.sleep(LOOK_PERIOD_S)
