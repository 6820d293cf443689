"""`llmsup reload`: the profile as it is now, and what that changed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from llmsup.cli import outcome, render, terminal
from llmsup.cli.wait import on_interrupt, wait_ready, wait_replaced
from llmsup.config.paths import paths
from llmsup.control.client import Client
from llmsup.control.wire import ServiceInfo, Status
from llmsup.errors import LlmsupError
from llmsup.host import procfs

GOES_ON = "the reload goes on: llmsup status shows it"
POLL_S = 0.05


def reload() -> None:
    """Have the daemon read its profile again; wait until all that this changes has happened.

    Raises UsageError with the problems of the profile, and LlmsupError where a service that was
    started or restarted for it fails.
    """
    began = time.monotonic()
    home = paths()
    client = Client(home)
    before = client.status()
    started_ticks = {
        pid: procfs.start_ticks(pid) for info in before["services"] if (pid := info["pid"])
    }
    client.reload()
    first = wait_replaced(home, began)
    at_least = _first_generations(before, first)

    def judge(status: Status) -> None:
        if words := outcome.unrestarted(status, at_least):
            raise LlmsupError(words, hint="llmsup status shows it; llmsup reload tries again")

    after = wait_ready(home, at_least, interrupted=GOES_ON, judge=judge)
    ended = [info for info in before["services"] if info["service"] not in _named(after)]
    with on_interrupt(GOES_ON):
        for pid in (info["pid"] for info in ended if info["pid"]):
            while procfs.start_ticks(pid) == started_ticks[pid] and not procfs.is_zombie(pid):
                time.sleep(POLL_S)
    words = str(changes(before, after))
    terminal.say(f"reloaded: {words} in {time.monotonic() - began:.1f} s")


@dataclass(frozen=True)
class Changes:
    """The services by what became of them, and the routes that are not what they were."""

    unchanged: int
    restarted: tuple[str, ...]
    started: tuple[str, ...]
    ended: tuple[str, ...]
    routes: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{render.count(self.unchanged, 'service')} unchanged"]
        rest = {
            "restarted": self.restarted,
            "started": self.started,
            "ended": self.ended,
            "routes changed:": self.routes,
        }
        parts += [f"{what} {', '.join(names)}" for what, names in rest.items() if names]
        return "; ".join(parts)


def changes(before: Status, after: Status) -> Changes:
    """What a reload did, told from the snapshots before and after it."""
    old, new = _named(before), _named(after)
    both = [name for name in new if name in old]
    restarted = tuple(
        name
        for name in both
        if new[name]["generation"] > old[name]["generation"] and old[name]["pid"] is not None
    )
    started = tuple(
        name
        for name in new
        if new[name]["pid"] is not None and (name not in old or old[name]["pid"] is None)
    )
    # The gateway is of every stack and of no profile: named where it changed, never counted.
    unchanged = [name for name in both if name not in {*restarted, *started, outcome.GATEWAY}]
    return Changes(
        unchanged=len(unchanged),
        restarted=restarted,
        started=started,
        ended=tuple(
            name
            for name, info in old.items()
            if info["pid"] is not None and (name not in new or new[name]["pid"] is None)
        ),
        routes=_changed_routes(before, after),
    )


def _first_generations(before: Status, first: Status) -> dict[str, int]:
    """What is waited for: every wanted service, in a new generation where it is to be restarted."""
    old, restarting = _named(before), first["daemon"]["restarting"]
    return {
        info["service"]: old[info["service"]]["generation"] + 1
        if info["service"] in restarting and info["service"] in old
        else 0
        for info in outcome.wanted(first)
    }


def _named(status: Status) -> Mapping[str, ServiceInfo]:
    return {info["service"]: info for info in status["services"]}


def _changed_routes(before: Status, after: Status) -> tuple[str, ...]:
    def declared(status: Status) -> dict[str, tuple[list[str], list[str]]]:
        return {route["route"]: (route["services"], route["aliases"]) for route in status["routes"]}

    old, new = declared(before), declared(after)
    return tuple(name for name in {**old, **new} if old.get(name) != new.get(name))
