"""The three clocks that tell whether the machine was away."""

import time

from llmsup.core.card import Clocks


def read_clocks() -> Clocks:
    """All of them, now."""
    return Clocks(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())
