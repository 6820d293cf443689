"""All the documents of one Envoy, and the files that they are in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmsup.core.routing import Endpoint, Route, UpstreamList
from llmsup.services import envoy, envoy_clusters, envoy_listener
from llmsup.services.envoy import Document, Layout
from llmsup.services.envoy_routes import Health, route_table

Build = Callable[[], Document]


@dataclass(frozen=True)
class Documents:
    """What an Envoy is given. Building a document takes longer than naming its file.

    `leaving`: clusters of an earlier profile, which Envoy may still be sending requests to.
    """

    layout: Layout
    routes: Sequence[Route]
    listen: Endpoint
    api_keys: Sequence[str]
    hold_module: bytes
    allowed_origins: Sequence[str] = ()
    leaving: Sequence[str] = ()
    admin_keys: Sequence[str] = ()

    def lists(self, upstream_lists: Mapping[str, UpstreamList]) -> Iterator[tuple[Path, Build]]:
        """One upstream list for each route."""
        for route in self.routes:
            build = partial(self.upstreams, route.name, upstream_lists[route.name])
            yield self.layout.upstreams(route.name), build

    def upstreams(self, route: str, upstream_list: UpstreamList) -> Document:
        """The upstream list of one route."""
        return envoy_clusters.upstreams(route, upstream_list, self.layout.activator_socket)

    def clusters(self) -> Iterator[tuple[Path, Build]]:
        """CDS, once for an Envoy that can hold streams and once for any other."""
        clusters = partial(envoy_clusters.clusters, self.layout, self.routes, self.leaving)
        yield self.layout.clusters, clusters
        yield self.layout.holding_clusters, partial(clusters, hold_module=self.hold_module)

    def trial(self, *, holds: bool) -> Document:
        """A bootstrap with all that an Envoy might refuse, which it would else read later."""
        module = self.hold_module if holds else b""
        clusters = envoy_clusters.clusters(self.layout, self.routes, hold_module=module)
        listeners = self._listeners()
        document = envoy.bootstrap(self.layout, holds=holds)
        del document["dynamic_resources"]
        static = {"clusters": _untyped(clusters), "listeners": _untyped(listeners)}
        return {**document, "static_resources": static}

    def tables(self, health: Health) -> Iterator[tuple[Path, Build]]:
        """The others. They are written after the lists: a cluster without one stays rejected."""
        layout, keys, origins = self.layout, self.api_keys, self.allowed_origins
        table = partial(route_table, self.routes, keys, health, origins, admin_keys=self.admin_keys)
        yield from self.clusters()
        yield layout.routes, table
        yield layout.listeners, self._listeners
        yield layout.bootstrap, partial(envoy.bootstrap, layout)
        yield layout.holding_bootstrap, partial(envoy.bootstrap, layout, holds=True)

    def _listeners(self) -> Document:
        return envoy_listener.listeners(self.layout, self.listen)


def _untyped(envelope: Document) -> list[Document]:
    """The resources of a watched file, as they stand in a bootstrap."""
    return [
        {key: part for key, part in resource.items() if key != "@type"}
        for resource in envelope["resources"]
    ]
