"""Where the time of a switch goes, by the daemon's journal."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsup.control.wire import SwitchResult

CONFIRM_MAX_S = 0.5

Told = Sequence[dict[str, Any]]
"""Events of the journal, oldest first."""


@dataclass(frozen=True)
class Switched:
    """One switch: what it said of itself, how long the target loaded, and when it was chosen."""

    result: SwitchResult
    load_s: float
    chosen_at: float

    @property
    def target(self) -> str:
        """The service."""
        return str(self.result["service"])

    @property
    def model(self) -> str:
        """What it serves since."""
        return str(self.result["current_model"])


@dataclass(frozen=True)
class Timing:
    """Where the time of one switch went, in seconds."""

    model: str
    total_s: float
    drain_s: float
    stop_s: float
    spawn_s: float
    load_s: float
    verify_s: float

    @property
    def beyond_s(self) -> float:
        """What it took beyond the load, and beyond the requests in flight."""
        return self.total_s - self.load_s - self.drain_s


def timing(told: Told, switched: Switched, *, gives_way_first: bool) -> Timing:
    """From what was told between the end of the switch before and the end of this one.

    `gives_way_first`: what ran before ended before the target loaded.
    """
    states = [each for each in told if each["event"] == "state"]
    target = switched.target
    starting = next(x["at_s"] for x in reversed(states) if _is(x, "starting", target))
    ready = next(x["at_s"] for x in states if _is(x, "ready", target) and x["at_s"] > starting)
    left = [each for each in states if each["at_s"] < starting] if gives_way_first else []
    stopping = next((x["at_s"] for x in reversed(left) if _is(x, "stopping")), starting)
    draining = next((x["at_s"] for x in reversed(left) if _is(x, "draining")), stopping)
    return Timing(
        model=switched.model,
        total_s=switched.result["switch_time_s"],
        drain_s=stopping - draining,
        stop_s=starting - stopping,
        spawn_s=ready - switched.load_s - starting,
        load_s=switched.load_s,
        verify_s=switched.chosen_at - ready,
    )


def _is(event: dict[str, Any], state: str, service: str | None = None) -> bool:
    return event["state"] == state and service in {None, event["service"]}


def written_at(path: Path) -> float:
    """When a file was written, as monotonic time; up to a tick of the kernel before it was.

    That of the choices is written once a target has proved itself, before it gets any request.
    """
    return path.stat().st_mtime - time.time() + time.monotonic()


def confirmed_at(events: Told, chosen_at: float) -> float:
    """When Envoy was last seen to get a list that was published then."""
    until = chosen_at + CONFIRM_MAX_S
    told = [each["at_s"] for each in events if each["event"] == "confirmed"]
    return max((at for at in told if chosen_at < at < until), default=chosen_at)
