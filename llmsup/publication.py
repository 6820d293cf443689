"""The upstream lists as they follow from the states of the services, and what is told of them."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from llmsup.control.wire import RouteInfo, UpstreamsInfo
from llmsup.core.routing import Endpoint, Member, Route, UpstreamList
from llmsup.core.service import ALIVE, Service, State, Want
from llmsup.gateway import Gateway
from llmsup.host.journal import Journal
from llmsup.keeper import Keeper
from llmsup.units import GATEWAY

log = logging.getLogger(__name__)


class Publication:
    """The lists of all routes, from the keepers of their services to the gateway."""

    def __init__(
        self,
        gateway: Gateway,
        routes: tuple[Route, ...],
        keepers: Mapping[str, Keeper],
        journal: Journal,
        *,
        is_cold: Callable[[Service], bool],
        status: Callable[[Route], str],
    ) -> None:
        self._gateway = gateway
        self._routes = routes
        self._keepers = keepers
        self._journal = journal
        self.withheld: dict[str, range] = {}
        """Generations of services that get no requests, ready or not."""
        self._is_cold = is_cold
        self._status = status

    @property
    def services(self) -> dict[str, Service]:
        """Every service but the gateway, as requests meet it."""
        return {
            name: replace(keeper.service, state=self._state(keeper.service))
            for name, keeper in self._keepers.items()
            if name != GATEWAY
        }

    def bring_up_to_date(self) -> None:
        """Have the gateway write what differs from what it wrote before."""
        services = self.services
        members = {
            name: Member(Endpoint("127.0.0.1", port), service.state, is_cold=self._is_cold(service))
            for name, service in services.items()
            if (port := self._keepers[name].port) is not None
        }
        not_ready = tuple(
            name
            for name, service in services.items()
            if service.want is Want.UP
            and service.state is not State.READY
            and not self._is_cold(service)  # which is nothing amiss
        )
        statuses = {route.name: self._status(route) for route in self._routes}
        for route in self._gateway.publish(members, not_ready, statuses):
            upstreams = self._published(route)
            log.info("route=%s upstreams=%s", route, ",".join(upstreams) or "-")
            self._journal.write("published", route=route, upstreams=upstreams)

    def note_confirmed(self, route: str, elapsed_s: float) -> None:
        """Envoy has been seen to have the list of the route, so long after it changed."""
        elapsed_ms = round(elapsed_s * 1000, 3)
        upstreams = self._published(route)
        self._journal.write("confirmed", route=route, upstreams=upstreams, elapsed_ms=elapsed_ms)

    def route_infos(self) -> list[RouteInfo]:
        """Each route and its published list."""
        return [
            {
                "route": route.name,
                "aliases": list(route.aliases),
                "services": list(route.services),
                "published": self._published(route.name),
            }
            for route in self._routes
        ]

    def upstreams(self) -> list[UpstreamsInfo]:
        """Each route's list as desired, as published, and as Envoy has it."""
        rows: list[UpstreamsInfo] = []
        for route in self._routes:
            confirmed = self._gateway.confirmed.get(route.name)
            rows.append(
                {
                    "route": route.name,
                    "desired": _routable(self._gateway.desired[route.name]),
                    "published": self._published(route.name),
                    "confirmed": None if confirmed is None else list(confirmed),
                }
            )
        return rows

    def _state(self, service: Service) -> State:
        """As routing is to see it."""
        is_withheld = service.generation in self.withheld.get(service.name, ())
        return State.STARTING if is_withheld and service.state in ALIVE else service.state

    def _published(self, route: str) -> list[str]:
        """The services that get new requests of the route."""
        return _routable(self._gateway.published[route])


def _routable(upstreams: UpstreamList) -> list[str]:
    return [upstream.service for upstream in upstreams if not upstream.is_draining]
