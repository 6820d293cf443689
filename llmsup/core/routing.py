"""Services to upstream lists. The lists are derived from states, never pushed by hand."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmsup.config.schema import LlamaServer, Profile
from llmsup.core.service import State


@dataclass(frozen=True)
class Endpoint:
    """Where one service listens."""

    host: str
    port: int


@dataclass(frozen=True)
class Route:
    """A model name (and its aliases) and the services that answer it, in order of preference."""

    name: str
    services: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every model name a client may use for this route."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Upstream:
    """One entry of an upstream list.

    `is_fallback`: not the first service of the route. `is_draining`: gets no new request and stays
    only so that its requests in flight can be counted; Envoy forgets them with the entry.
    """

    service: str
    endpoint: Endpoint
    is_fallback: bool
    is_draining: bool = False


UpstreamList = tuple[Upstream, ...]
"""The upstreams of one route, the preferred first."""


@dataclass(frozen=True)
class Member:
    """What routing needs to know of a service; `is_cold` as in `core.demand`."""

    endpoint: Endpoint
    state: State
    is_cold: bool = False


LISTED = frozenset({State.READY, State.UNREADY, State.DRAINING})
"""The states of a service that may be answering requests. Only READY gets new ones."""


def effective_routes(profile: Profile) -> tuple[Route, ...]:
    """The declared routes, then each llama-server under its service name where that is free."""
    declared = tuple(
        Route(name, route.services, route.aliases) for name, route in profile.route.items()
    )
    taken = {name for route in declared for name in route.names}
    implicit = tuple(
        Route(name, (name,))
        for name, service in profile.service.items()
        if isinstance(service, LlamaServer) and name not in taken
    )
    return declared + implicit


def desired(routes: tuple[Route, ...], members: Mapping[str, Member]) -> dict[str, UpstreamList]:
    """The upstream list of each route, by route name, in the route's order."""
    return {route.name: _upstreams(route, members) for route in routes}


def _upstreams(route: Route, members: Mapping[str, Member]) -> UpstreamList:
    """Requests wait for one that is cold, so those behind it get no new ones."""
    upstreams = []
    is_behind_cold = False
    for position, name in enumerate(route.services):
        member = members.get(name)
        if member is None:
            continue
        if member.state in LISTED:
            is_draining = is_behind_cold or member.state is not State.READY
            upstreams.append(Upstream(name, member.endpoint, position > 0, is_draining))
        is_behind_cold = is_behind_cold or member.is_cold
    return tuple(upstreams)


def diff(
    wanted: Mapping[str, UpstreamList], published: Mapping[str, UpstreamList]
) -> dict[str, UpstreamList]:
    """The lists that have to be written: those of `wanted` that `published` does not have."""
    return {
        name: upstreams for name, upstreams in wanted.items() if published.get(name) != upstreams
    }
