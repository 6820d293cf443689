"""Keeps log files below their limits while others write them."""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmsup.host import logfile

log = logging.getLogger(__name__)

PERIOD_S = 2.0


@dataclass(frozen=True)
class Rotated:
    """A log, how large its live file may grow, and how many older parts are kept."""

    path: Path
    max_bytes: int = 10 * 1024 * 1024
    keep: int = 3


async def keep_rotated(logs: Iterable[Rotated]) -> None:
    """Rotate, until cancelled, what has outgrown its limit. Trouble is said once, not each time."""
    logs = tuple(logs)
    trouble = ""
    while True:
        await asyncio.sleep(PERIOD_S)
        last, trouble = trouble, ""
        for each in logs:
            if logfile.size_bytes(each.path) <= each.max_bytes:
                continue
            try:
                await asyncio.to_thread(
                    logfile.rotate, each.path, max_bytes=each.max_bytes, keep=each.keep
                )
            except OSError as error:
                trouble = f"{each.path} is not being rotated: {error}"
                if trouble != last:
                    log.warning(trouble)
