"""Tells the service manager how we are: the protocol of sd_notify(3), a datagram to a socket."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

SOCKET = "NOTIFY_SOCKET"
WATCHDOG_PERIOD = "WATCHDOG_USEC"
WATCHDOG_PID = "WATCHDOG_PID"
VARIABLES = (SOCKET, WATCHDOG_PERIOD, WATCHDOG_PID)
"""Meant for the main process of a unit alone: what it starts must not speak in its name."""


class Notifier:
    """Sends to NOTIFY_SOCKET. Without one, and where it is gone or full, nothing is sent.

    Nothing here blocks or raises: a service manager that does not listen must not cost a request.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get(SOCKET, ""))

    def tell(self, **assignments: str) -> bool:
        """Send `KEY=value` lines in one datagram; returns whether somebody took it."""
        if self._address is None:
            return False
        text = "\n".join(f"{key}={' '.join(value.split())}" for key, value in assignments.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
                to.setblocking(False)
                to.sendto(text.encode(errors="replace"), self._address)
        except OSError:
            return False
        return True


def watchdog_period_s(environ: Mapping[str, str]) -> float | None:
    """How long the service manager waits for a ping of this process; None where it does not."""
    if environ.get(WATCHDOG_PID, str(os.getpid())) != str(os.getpid()):
        return None
    with suppress(ValueError):
        period_us = int(environ.get(WATCHDOG_PERIOD, ""))
        return period_us / 1e6 if period_us > 0 else None
    return None


def monotonic_us() -> str:
    """The time as `MONOTONIC_USEC` wants it: CLOCK_MONOTONIC, in microseconds."""
    return str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def without(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for another process than the one that the service manager watches."""
    return {name: value for name, value in environ.items() if name not in VARIABLES}


def _address(text: str) -> str | None:
    """A path, or a name in the abstract namespace; others (vsock) are of virtual machines."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else None
