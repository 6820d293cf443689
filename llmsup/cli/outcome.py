"""When a start, a restart or a stop is over, told from snapshots of the stack."""

from collections.abc import Collection, Mapping
from enum import Enum

from llmsup.control.wire import ServiceInfo, Status

GATEWAY = "gateway"
"""The service that is of every stack and of no profile: it is not counted."""


class Outcome(Enum):
    """How far the services are that somebody waits for."""

    WAITING = "waiting"
    READY = "ready"
    FAILED = "failed"


def wanted(status: Status) -> list[ServiceInfo]:
    """The services that the operator wants up."""
    return [service for service in status["services"] if service["want"] == "up"]


def count_wanted(status: Status) -> int:
    """How many services of the profile the operator wants up."""
    return sum(service["service"] != GATEWAY for service in wanted(status))


def count_up(status: Status) -> int:
    """How many services of the profile have a process."""
    return sum(
        service["pid"] is not None and service["service"] != GATEWAY
        for service in status["services"]
    )


def is_degraded(status: Status) -> bool:
    """Whether the stack is stopping, or the gateway or a service that is wanted is not ready."""
    return status["daemon"]["stopping"] or any(
        service["state"] != "ready"
        for service in status["services"]
        if service["want"] == "up" or service["service"] == GATEWAY
    )


def outcome(status: Status, first_generations: Mapping[str, int]) -> Outcome:
    """Where the services named by `first_generations` stand.

    Older generations than these do not count. A service that waits for its dependencies is given
    up once one of the stack has failed and nothing else moves; one that is not wanted any more (its
    job is done, or somebody stopped it) is not waited for.
    """
    awaited = _awaited(status, first_generations)
    if any(_is_moving(service, first_generations, status) for service in awaited):
        return Outcome.WAITING
    if any(service["state"] == "failed" for service in awaited):
        return Outcome.FAILED
    if any(_is_blocked(service) for service in awaited):
        hopeless = any(service["state"] == "failed" for service in status["services"])
        return Outcome.FAILED if hopeless else Outcome.WAITING
    return Outcome.READY


def troubles(status: Status, names: Collection[str]) -> list[ServiceInfo]:
    """The named services that failed or wait for one that did."""
    return [
        service
        for service in _awaited(status, names)
        if service["state"] == "failed" or _is_blocked(service)
    ]


def unready(status: Status, names: Collection[str]) -> list[str]:
    """The named services that are not ready, with their states and reasons."""
    return [
        f"{service['service']} ({service['state']}{_because(service)})"
        for service in _awaited(status, names)
        if service["state"] != "ready"
    ]


def unrestarted(status: Status, first_generations: Mapping[str, int]) -> str:
    """A sentence about services that a rolling restart ended before; "" while there are none.

    The roll ends at a service that does not become ready.
    """
    pending = status["daemon"]["restarting"]
    left = [
        service["service"]
        for service in _awaited(status, first_generations)
        if service["want"] == "up"
        and service["service"] not in pending
        and service["generation"] < first_generations[service["service"]]
    ]
    if not left:
        return ""
    culprit = _culprit(status, first_generations)
    if culprit is None:
        reasons = {info["why"] for info in _awaited(status, left) if info["why"]}
        return ": ".join([f"{_were(left)} not restarted", *sorted(reasons)])
    reason = f"{culprit['service']} did not become ready ({culprit['why'] or culprit['state']})"
    others = [name for name in left if name != culprit["service"]]
    return f"{_were(others)} not restarted: {reason}" if others else reason


def _culprit(status: Status, first_generations: Mapping[str, int]) -> ServiceInfo | None:
    """The service that is not ready, first of those that were restarted."""
    candidates = [
        service
        for service in _awaited(status, first_generations)
        if service["want"] == "up" and service["state"] != "ready"
    ]
    restarted = [
        service
        for service in candidates
        if service["generation"] >= first_generations[service["service"]]
    ]
    return next(iter(restarted or candidates), None)


def _were(names: Collection[str]) -> str:
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"


def _because(service: ServiceInfo) -> str:
    return f": {service['why']}" if service["why"] else ""


def _awaited(status: Status, names: Collection[str]) -> list[ServiceInfo]:
    return [service for service in status["services"] if service["service"] in names]


def _is_blocked(service: ServiceInfo) -> bool:
    return service["state"] == "stopped" and service["want"] == "up"


def _is_moving(service: ServiceInfo, first_generations: Mapping[str, int], status: Status) -> bool:
    if service["service"] in status["daemon"]["restarting"]:
        return True
    if service["state"] == "stopped":  # by somebody else, or blocked
        return False
    is_settled = service["state"] in {"ready", "failed"}
    return not is_settled or service["generation"] < first_generations[service["service"]]
