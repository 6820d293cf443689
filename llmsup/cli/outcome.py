"""When a start or a restart is over, told from snapshots of the stack."""

from collections.abc import Mapping
from enum import Enum

from llmsup.control.wire import ServiceInfo, Status


class Outcome(Enum):
    """How far the services are that somebody waits for."""

    WAITING = "waiting"
    READY = "ready"
    FAILED = "failed"


def wanted(status: Status) -> list[ServiceInfo]:
    """The services that the operator wants up."""
    return [service for service in status["services"] if service["want"] == "up"]


def is_degraded(status: Status) -> bool:
    """Whether a service that is wanted is not ready."""
    return any(service["state"] != "ready" for service in wanted(status))


def outcome(status: Status, first_generations: Mapping[str, int]) -> Outcome:
    """Where the services named by `first_generations` stand.

    Older generations than these do not count. A service that waits for its dependencies is given
    up once one of the stack has failed and nothing else moves; one that is not wanted any more (its
    job is done, or somebody stopped it) is not waited for.
    """
    awaited = _awaited(status, first_generations)
    if any(_is_moving(service, first_generations[service["service"]]) for service in awaited):
        return Outcome.WAITING
    if any(service["state"] == "failed" for service in awaited):
        return Outcome.FAILED
    if any(_is_blocked(service) for service in awaited):
        hopeless = any(service["state"] == "failed" for service in status["services"])
        return Outcome.FAILED if hopeless else Outcome.WAITING
    return Outcome.READY


def troubles(status: Status, names: Mapping[str, int]) -> list[str]:
    """A sentence for each of the named services that failed or waits for one that did."""
    return [
        f"{service['service']} {service['state']}: {service['why']}"
        for service in _awaited(status, names)
        if service["state"] == "failed" or _is_blocked(service)
    ]


def unready(status: Status, names: Mapping[str, int]) -> list[str]:
    """The named services that are not ready, with their states."""
    return [
        f"{service['service']} ({service['state']})"
        for service in _awaited(status, names)
        if service["state"] != "ready"
    ]


def _awaited(status: Status, names: Mapping[str, int]) -> list[ServiceInfo]:
    return [service for service in status["services"] if service["service"] in names]


def _is_blocked(service: ServiceInfo) -> bool:
    return service["state"] == "stopped" and service["want"] == "up"


def _is_moving(service: ServiceInfo, first_generation: int) -> bool:
    if _is_blocked(service):
        return False
    is_settled = service["state"] in {"ready", "failed", "stopped"}
    return not is_settled or service["generation"] < first_generation
