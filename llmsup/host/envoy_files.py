"""What an Envoy was last given, read back from its files by the daemon that takes it over."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmsup.core.routing import Route, Upstream, UpstreamList
from llmsup.services import envoy_clusters
from llmsup.services.envoy import Layout


@dataclass(frozen=True)
class LastGiven:
    """`kept`: the lists on disk, by route. `lists` has those, and one for each route that is new.

    `clusters`: the names of all; also those that no route has any more.
    """

    kept: Mapping[str, UpstreamList] = field(default_factory=dict)
    lists: Mapping[str, UpstreamList] = field(default_factory=dict)
    clusters: frozenset[str] = frozenset()


def read(layout: Layout, routes: Sequence[Route]) -> LastGiven:
    """Files that cannot be read are as good as none.

    A route that is new gets those of its services that another route's list has: they are being
    sent requests at this very moment, and a list without them would refuse what they can answer.
    """
    kept = {}
    for route in routes:
        with suppress(OSError, ValueError):
            kept[route.name] = _read_list(layout.upstreams(route.name))
    known = _by_service(layout.upstreams("").parent)
    lists = {route.name: kept.get(route.name) or _begun(route, known) for route in routes}
    clusters: frozenset[str] = frozenset()
    with suppress(OSError, ValueError):
        clusters = envoy_clusters.parse_names(layout.clusters.read_bytes())
    return LastGiven(kept, lists, clusters)


def remove_others(layout: Layout, routes: Iterable[Route]) -> None:
    """Remove the lists of routes that are no more."""
    ours = {layout.upstreams(route.name) for route in routes}
    with suppress(OSError):
        for path in layout.upstreams("").parent.iterdir():
            if path not in ours:
                path.unlink()


def _read_list(path: Path) -> UpstreamList:
    return envoy_clusters.parse_upstreams(path.read_bytes())


def _by_service(directory: Path) -> dict[str, Upstream]:
    """The upstreams of all lists, of other routes, too, that get new requests."""
    known = {}
    with suppress(OSError):
        for path in directory.glob("*.json"):
            with suppress(OSError, ValueError):
                known.update({it.service: it for it in _read_list(path) if not it.is_draining})
    return known


def _begun(route: Route, known: Mapping[str, Upstream]) -> UpstreamList:
    return tuple(
        replace(known[name], is_fallback=position > 0)
        for position, name in enumerate(route.services)
        if name in known
    )
