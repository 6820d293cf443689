"""What keepers ask of the card, and tell it."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from llmsup.core.grant import Grant


class CardUse(Protocol):
    """The card as one keeper sees it; see `CardGate`."""

    def ask(self, service: str, generation: int) -> asyncio.Future[Grant]:
        """What a generation may have, once it may be started."""
        ...

    def why(self, service: str) -> str:
        """What it waits for."""
        ...

    def recall(self, service: str, written: str) -> tuple[Grant, bool]:
        """What a live process was given, and whether it could be given it now."""
        ...

    def adopt(
        self,
        service: str,
        generation: int,
        grant: Grant,
        measured_bytes: int | None,
    ) -> None:
        """It goes on with what it has."""
        ...

    def note_out_of_memory(self, service: str, lines: Sequence[str]) -> tuple[str, bool]:
        """Its process died of it: what to say, and whether its next plan is a smaller one."""
        ...
