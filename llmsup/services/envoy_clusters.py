"""Envoy's clusters (CDS), one for each route, and their upstream lists (EDS)."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import msgspec

from llmsup.core.routing import Route, Upstream, UpstreamList
from llmsup.services.envoy import (
    ACTIVATOR,
    METADATA,
    TYPE,
    Document,
    Layout,
    cluster_name,
    discovery,
    file_source,
    http_filter,
)

CONCURRENT_MAX = 1024
ROUTE_HEADER = "x-llmsup-route"
"""Tells the activator which route a request was for."""


def clusters(
    layout: Layout,
    routes: Sequence[Route],
    leaving: Sequence[str] = (),
    *,
    hold_module: bytes = b"",
) -> Document:
    """CDS: one cluster for each route, its endpoints in a file of their own; then those `leaving`.

    `hold_module`: the assembled hold filter, for an Envoy that can run it.
    """
    holds = [hold_filter(hold_module)] if hold_module else []
    names = (*(cluster_name(route.name) for route in routes), *leaving)
    clusters = (_cluster(layout, name, holds) for name in names)
    return discovery(*clusters, _activator_cluster(layout))


class _Named(msgspec.Struct, frozen=True):
    name: str
    type: str


class _Clusters(msgspec.Struct, frozen=True):
    resources: tuple[_Named, ...]


def parse_names(content: bytes) -> frozenset[str]:
    """The names of the routes' clusters in a file that `clusters` made.

    Raises ValueError for any other file.
    """
    decoded = msgspec.json.decode(content, type=_Clusters)
    return frozenset(cluster.name for cluster in decoded.resources if cluster.type == "EDS")


def hold_filter(module: bytes) -> Document:
    """Keeps the headers of an answer back until its first byte (hold.wat)."""
    config = {
        "name": "hold",
        # Without it, stopping at the headers would keep the body back, too.
        "allow_on_headers_stop_iteration": True,
        "failure_policy": "FAIL_OPEN",
        # One virtual machine for all clusters, and no runtime named: the one that is built in.
        "vm_config": {
            "vm_id": "hold",
            "code": {"local": {"inline_bytes": b64encode(module).decode()}},
        },
    }
    return http_filter("wasm", "Wasm", {"config": config})


def hold_trial(module: bytes) -> Document:
    """A bootstrap that an Envoy accepts if it can run the hold filter."""
    cluster = {"name": "trial", **_protocol(hold_filter(module))}
    return {"static_resources": {"clusters": [cluster]}}


def _protocol(*filters: Document) -> Document:
    """How a cluster speaks to its upstreams, through `filters` that are next to them."""
    options = {
        "@type": TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http_protocol_options": {}},
        # Below the 5 s after which llama-server closes an idle connection.
        "common_http_protocol_options": {"idle_timeout": "4s"},
        "http_filters": [*filters, http_filter("upstream_codec", "UpstreamCodec", {})],
    }
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {"typed_extension_protocol_options": {name: options}}


def _cluster(layout: Layout, name: str, holds: Sequence[Document]) -> Document:
    told = http_filter("header_mutation", "HeaderMutation", {"mutations": _upstream_headers()})
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": "EDS",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "eds_cluster_config": {
            "service_name": name,
            "eds_config": file_source(layout.upstreams_of_cluster(name)),
        },
        # An empty priority is skipped, never used in a panic.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        # The default of 3 concurrent retries would cut all but three requests of a dead upstream.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": CONCURRENT_MAX,
                    "max_pending_requests": CONCURRENT_MAX,
                    "max_requests": CONCURRENT_MAX,
                    "max_retries": CONCURRENT_MAX,
                }
            ]
        },
        **_protocol(*holds, told),
    }


def _activator_cluster(layout: Layout) -> Document:
    """For requests that are the daemon's own business, whatever route there is."""
    address = {"pipe": {"path": str(layout.activator_socket)}}
    endpoint = {"lb_endpoints": [{"endpoint": {"address": address}}]}
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": ACTIVATOR,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": ACTIVATOR, "endpoints": [endpoint]},
        **_protocol(),
    }


def _upstream_headers() -> Document:
    """Set next to the upstream, so that Envoy's own replies never claim to come from a service."""
    told = {"x-llmsup-service": "service", "x-llmsup-fallback": "fallback"}
    return {
        # Only the activator's metadata has a route, and what is empty is not added.
        "request_mutations": [
            {"remove": "x-forwarded-proto"},
            _told(ROUTE_HEADER, "route"),
        ],
        "response_mutations": [_told(key, field) for key, field in told.items()],
    }


def _told(key: str, field: str) -> Document:
    value = f"%UPSTREAM_METADATA({METADATA}:{field})%"
    return {
        "append": {
            "header": {"key": key, "value": value},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
    }


def upstreams(route: str, upstream_list: UpstreamList, activator: Path) -> Document:
    """EDS: one upstream list, and the activator behind it.

    Its order is the order of priorities, without gaps.
    """
    endpoints = [*map(_upstream, upstream_list), _activator(route, activator)]
    return discovery(
        {
            "@type": TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": cluster_name(route),
            "endpoints": [
                {"priority": priority, "lb_endpoints": [endpoint]}
                for priority, endpoint in enumerate(endpoints)
            ],
            # Everything goes to the first priority that has an upstream, nothing is spread.
            "policy": {"overprovisioning_factor": 100},
        }
    )


def _upstream(upstream: Upstream) -> Document:
    address = {"address": upstream.endpoint.host, "port_value": upstream.endpoint.port}
    told = {"service": upstream.service, "fallback": str(upstream.is_fallback).lower()}
    return {
        "endpoint": {"address": {"socket_address": address}},
        "health_status": "DRAINING" if upstream.is_draining else "HEALTHY",
        "metadata": {"filter_metadata": {METADATA: told}},
    }


def _activator(route: str, socket: Path) -> Document:
    return {
        "endpoint": {"address": {"pipe": {"path": str(socket)}}},
        "health_status": "HEALTHY",
        "metadata": {"filter_metadata": {METADATA: {"route": cluster_name(route)}}},
    }


def parse_upstreams(content: bytes) -> UpstreamList:
    """The upstream list that `upstreams` made this file of. Raises ValueError for any other."""
    try:
        (resource,) = msgspec.json.decode(content)["resources"]
        entries = [entry for each in resource["endpoints"] for entry in each["lb_endpoints"]]
        return tuple(_parse_upstream(it) for it in entries if not _is_activator(it))
    except (KeyError, TypeError, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not an upstream list: {error}") from None


def _is_activator(entry: Document) -> bool:
    return "pipe" in entry["endpoint"]["address"]


def _parse_upstream(entry: Document) -> Upstream:
    address = entry["endpoint"]["address"]["socket_address"]
    told = entry["metadata"]["filter_metadata"][METADATA]
    fields = {
        "service": told["service"],
        "endpoint": {"host": address["address"], "port": address["port_value"]},
        "is_fallback": told["fallback"] == "true",
        "is_draining": entry["health_status"] == "DRAINING",
    }
    upstream = msgspec.convert(fields, Upstream)
    if not 0 < upstream.endpoint.port < 65536:
        raise ValueError(f"not an upstream list: port {upstream.endpoint.port}")
    return upstream
