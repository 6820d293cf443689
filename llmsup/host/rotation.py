"""Keeps log files below their limits while others write them."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmsup.host import logfile
from llmsup.troubles import Troubles

PERIOD_S = 2.0


@dataclass(frozen=True)
class Rotated:
    """A log, how large its live file may grow, and how many older parts are kept."""

    path: Path
    max_bytes: int
    keep: int


async def keep_rotated(logs: Iterable[Rotated], troubles: Troubles) -> None:
    """Rotate, until cancelled, what has outgrown its limit."""
    logs = tuple(logs)
    while True:
        await asyncio.sleep(PERIOD_S)
        for each in logs:
            with troubles.watched(f"{each.path} is not being rotated"):
                if logfile.size_bytes(each.path) > each.max_bytes:
                    await asyncio.to_thread(
                        logfile.rotate, each.path, max_bytes=each.max_bytes, keep=each.keep
                    )
