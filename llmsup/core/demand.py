"""What becomes of a request for which no upstream answers, and which service it starts.

A service that starts on demand is *cold* while it is on its way up or down and has not died: a
request can have it by waiting. What stands behind it in a route does not answer meanwhile: a
fallback is for a service that fails, not for one that sleeps. The same holds in single mode for a
service that takes turns with others: a request has it swapped in.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llmsup.core.routing import Route
from llmsup.core.service import Service, State, Want

_UP = frozenset({State.READY, State.UNREADY})
_FAILING = frozenset({State.BACKOFF, State.FAILED})
NO_TURNS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Start:
    """Want this service up, and ask again."""

    service: str


@dataclass(frozen=True)
class Swap:
    """Wait for this service's turn to have the place of another one."""

    service: str


@dataclass(frozen=True)
class Hold:
    """Wait for a change."""


@dataclass(frozen=True)
class Repeat:
    """A service of the route gets new requests: have this one sent there."""


@dataclass(frozen=True)
class Refuse:
    """Nothing comes, for this reason."""

    why: str


Answer = Start | Swap | Hold | Repeat | Refuse


def is_cold(service: Service) -> bool:
    """Whether this service, which a request brings up, has only to be waited for."""
    return not service.deaths and service.state not in _UP | _FAILING


def answer(
    route: Route,
    services: Mapping[str, Service],
    on_demand: Collection[str],
    expected: Collection[str] = (),
    turns: Mapping[str, str] = NO_TURNS,
) -> Answer:
    """What a request for the route gets, as its services are now.

    `on_demand`: the names of those that a request starts. `expected`: of those that a switch is
    about to bring up, wanted or not yet. `turns`: of those that take turns, and why no turn of
    theirs is tried just now, empty where it is.
    """
    is_coming = not set(expected).isdisjoint(route.services)
    is_returning = False  # of its own accord
    for name in route.services:
        service = services[name]
        has_turns = turns.get(name) == ""
        is_down = service.want is Want.DOWN
        if service.state is State.READY:
            return Repeat()
        if name in on_demand and is_down:
            return Hold() if name in expected else Start(name)
        if has_turns and is_down and is_cold(service):
            # A fallback does not take the place of one that is only being restarted.
            return Hold() if is_returning or name in expected else Swap(name)
        if not is_down and service.state is not State.FAILED:
            if (name in on_demand or has_turns) and is_cold(service):
                return Hold()
            is_coming = is_returning = True
    if is_coming:
        return Hold()
    return Refuse("; ".join(turns.get(name) or _said(services[name]) for name in route.services))


def status(found: Answer, asleep: Collection[str]) -> str:
    """What `/v1/models` says of a route whose requests get `found`, in the words of llama.cpp.

    `asleep`: services that were unloaded because no request came.
    """
    match found:
        case Repeat():
            return "loaded"
        case Hold():
            return "loading"
        case Start(name) | Swap(name) if name in asleep:
            return "sleeping"
        case _:
            return "unloaded"


def _said(service: Service) -> str:
    why = f" ({service.why})" if service.why else ""
    return f"{service.name} is {service.state.value}{why}"
