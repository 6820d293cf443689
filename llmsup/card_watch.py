"""The card as the daemon knows it: read now and then, and watched for a loss.

Where there is no card, next to nothing is done: it is looked for once a minute.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from llmsup.core import card
from llmsup.core.card import Action, Card, Clocks, Condition
from llmsup.core.device import Absence, Device, NoDevice, Reading

PERIOD_S = 5.0
LOOK_AGAIN_S = 60.0
FRESH_S = 1.0
BUSY_PERCENT = 5
"""Below it a desktop is drawn; a server that computes takes much more."""


class CardWatch:
    """One card. `read` reads it, and `on_action` is told what `core.card` wants done."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Reading]],
        read_clocks: Callable[[], Clocks],
        on_action: Callable[[Action], None],
    ) -> None:
        self._read = read
        self._read_clocks = read_clocks
        self._on_action = on_action
        self._card = Card()
        self._asked = asyncio.Event()
        self._was_read = asyncio.Event()
        self.reading: Reading = NoDevice(Absence.SILENT, "it has not been looked for yet")

    @property
    def device(self) -> Device | None:
        """The card as it was read last; None where the last reading found none."""
        return self.reading if isinstance(self.reading, Device) else None

    @property
    def is_busy(self) -> bool | None:
        """Whether it computed lately, for whomever; None where that is not known."""
        percent = None if self.device is None else self.device.utilization_percent
        return None if percent is None else percent >= BUSY_PERCENT

    @property
    def why(self) -> str:
        """Why there is no device; empty where there is one."""
        if isinstance(self.reading, Device):
            return ""
        is_lost = self._card.condition is Condition.LOST
        rest = "; the services that use it are restarted once it is back" if is_lost else ""
        return self.reading.reason + rest

    def ask(self) -> None:
        """Have a card that is there read again, unless that was done within the last second."""
        seen_at = self._card.clocks
        is_there = self._card.condition is not Condition.UNSEEN
        if is_there and seen_at is not None:
            age_s = self._read_clocks().monotonic_s - seen_at.monotonic_s
            if age_s > FRESH_S:
                self._asked.set()

    async def next_reading(self) -> Reading:
        """The card as it is read next."""
        await self._was_read.wait()
        return self.reading

    async def keep(self) -> None:
        """Read and watch until cancelled."""
        while True:
            self.reading = await self._read()
            self._asked.clear()  # whoever asked meanwhile has been answered
            self._card, actions = card.step(self._card, self.reading, self._read_clocks())
            for action in actions:
                self._on_action(action)
            self._was_read.set()
            self._was_read = asyncio.Event()
            is_there = self._card.condition is not Condition.UNSEEN
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S if is_there else LOOK_AGAIN_S):
                    await self._asked.wait()
