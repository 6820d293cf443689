"""Tells the service manager the truth about the stack: ready, how it gets on, and still alive.

READY is told once every wanted service has settled: it is ready, or is not coming up for a reason
that the status line gives. A start job that ended as soon as the daemon worked would be quicker
and say nothing; one that waited for all to be ready would make one bad model file restart the
rest for ever. While models load, the time-out of the job is moved ahead.
"""

import asyncio
from collections.abc import Callable
from enum import Enum

from llmsup.control.wire import ServiceInfo, Status
from llmsup.host.notify import Notifier, monotonic_us

EXTENSION_S = 60.0
EXTEND_EVERY_S = 10.0
WATCHDOG_SHARE = 0.5
REASON_MAX_CHARS = 80

_UNDECIDED = frozenset({"starting", "draining", "stopping"})


class Phase(Enum):
    """What the service manager was told."""

    STARTING = "starting"  # nothing yet, or that a reload has begun and was refused
    READY = "ready"
    RELOADING = "reloading"  # another daemon tells when that is over
    STOPPING = "stopping"


class Announcer:
    """Speaks for one stack. Used from its event loop."""

    def __init__(self, notifier: Notifier, status: Callable[[], Status]) -> None:
        self._notifier = notifier
        self._status = status
        self._is_due = False
        self._phase = Phase.STARTING
        self._told = ""
        self._remark = ""

    def begin(self, watchdog_period_s: float | None) -> None:
        """Speak from now on, and ping every half `watchdog_period_s` from the event loop."""
        if watchdog_period_s is not None:
            self._ping(watchdog_period_s * WATCHDOG_SHARE)
        self._extend()
        self.note_change()

    def note_change(self) -> None:
        """Something changed in the stack. Changes that come together are told together."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._tell)

    def note_reloading(self) -> None:
        """A reload was asked for; READY is told again when it is done or refused."""
        if self._phase is not Phase.STOPPING:
            self._notifier.tell(RELOADING="1", MONOTONIC_USEC=monotonic_us())
            self._phase = Phase.RELOADING

    def note_refused(self, reason: str) -> None:
        """The reload was refused and nothing has changed: the status line says so from now on."""
        self._remark = f"reload refused: {_short(reason)}"
        if self._phase is Phase.RELOADING:
            self._phase = Phase.STARTING
        self.note_change()

    def _tell(self) -> None:
        self._is_due = False
        status = self._status()
        if status["daemon"]["stopping"] and self._phase is not Phase.STOPPING:
            self._phase = Phase.STOPPING
            self._notifier.tell(STOPPING="1")
        line = "; ".join(filter(None, (status_line(status), self._remark)))
        if line != self._told and self._notifier.tell(STATUS=line):
            self._told = line
        is_ready = self._phase is Phase.STARTING and has_settled(status)
        if is_ready and self._notifier.tell(READY="1"):
            self._phase = Phase.READY

    def _ping(self, every_s: float) -> None:
        self._notifier.tell(WATCHDOG="1")
        asyncio.get_running_loop().call_later(every_s, self._ping, every_s)

    def _extend(self) -> None:
        """Loads and drains have bounds of their own: the service manager's must not come first."""
        if self._phase is not Phase.READY:
            self._notifier.tell(EXTEND_TIMEOUT_USEC=str(int(EXTENSION_S * 1e6)))
            self.note_change()  # a datagram that found the socket full is sent again
        asyncio.get_running_loop().call_later(EXTEND_EVERY_S, self._extend)


def has_settled(status: Status) -> bool:
    """Whether every wanted service is ready or has shown that it is not coming up just now."""
    if status["daemon"]["restarting"]:
        return False
    wanted = [info for info in status["services"] if info["want"] == "up"]
    if any(info["state"] in _UNDECIDED for info in wanted):
        return False
    # One that is stopped and wanted waits for others: in vain, once one of them is in trouble.
    return not any(map(_is_waiting, wanted)) or any(
        info["state"] in {"failed", "backoff", "unready"} for info in wanted
    )


def status_line(status: Status) -> str:
    """One line: "4 of 5 ready; code failed: model file corrupt"."""
    if status["daemon"]["stopping"]:
        left = [info["service"] for info in status["services"] if info["pid"] is not None]
        return f"stopping: {', '.join(left)}" if left else "stopping"
    wanted = [info for info in status["services"] if info["want"] == "up"]
    ready = sum(info["state"] == "ready" for info in wanted)
    troubles = [_trouble(info) for info in wanted if info["state"] != "ready"]
    return "; ".join([f"{ready} of {len(wanted)} ready", *troubles])


def _is_waiting(info: ServiceInfo) -> bool:
    return info["state"] == "stopped"


def _trouble(info: ServiceInfo) -> str:
    state = "waiting" if _is_waiting(info) else info["state"]
    return f"{info['service']} {state}" + (f": {_short(info['why'])}" if info["why"] else "")


def _short(reason: str) -> str:
    is_long = len(reason) > REASON_MAX_CHARS
    return f"{reason[: REASON_MAX_CHARS - 1]}…" if is_long else reason
