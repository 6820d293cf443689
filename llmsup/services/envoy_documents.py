"""All the documents of one Envoy, and the files that they are in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmsup.core.routing import Endpoint, Route, UpstreamList
from llmsup.services import envoy, envoy_clusters, envoy_listener
from llmsup.services.envoy import Document, Layout
from llmsup.services.envoy_routes import route_table

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
    allowed_origins: Sequence[str] = ()
    leaving: Sequence[Document] = ()

    def lists(self, upstream_lists: Mapping[str, UpstreamList]) -> Iterator[tuple[Path, Build]]:
        """One upstream list for each route."""
        for route in self.routes:
            build = partial(envoy_clusters.upstreams, route.name, upstream_lists[route.name])
            yield self.layout.upstreams(route.name), build

    def tables(self, not_ready: Sequence[str]) -> Iterator[tuple[Path, Build]]:
        """The others. They are written after the lists: a cluster without one stays rejected."""
        layout, keys, origins = self.layout, self.api_keys, self.allowed_origins
        yield layout.clusters, self.clusters
        yield layout.routes, partial(route_table, self.routes, keys, not_ready, origins)
        yield layout.listeners, partial(envoy_listener.listeners, layout, self.listen)
        yield layout.bootstrap, partial(envoy.bootstrap, layout)

    def clusters(self) -> Document:
        """One cluster for each route, and those that are leaving."""
        return envoy_clusters.clusters(self.layout, self.routes, self.leaving)
