"""What Envoy tells about itself on its admin socket: paths to ask, and the answers read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from llmsup.core.routing import Endpoint, UpstreamList
from llmsup.services.envoy import LISTENER, cluster_name

CLUSTERS_PATH = "/clusters?format=json"
DRAIN_PATH = "/drain_listeners?graceful"
_REQUESTS_ACTIVE = f"http.{LISTENER}.downstream_rq_active"
REQUESTS_ACTIVE_PATH = "/stats?filter=" + quote(f"^{_REQUESTS_ACTIVE}$")
SERVER_INFO_PATH = "/server_info"
LISTENERS_PATH = "/listeners"
HOT_RESTART_VERSION_PATH = "/hot_restart_version"


@dataclass(frozen=True)
class Server:
    """Which of the processes that took over from each other this is, and whether it serves."""

    epoch: int
    is_live: bool


@dataclass(frozen=True)
class Host:
    """One endpoint as Envoy has it: a service's, or the socket of the activator."""

    endpoint: Endpoint | Path
    is_draining: bool


@dataclass(frozen=True)
class SeenHost:
    """A host, how many requests it is answering, and how many it was ever sent."""

    host: Host
    requests_active: int
    requests_total: int = 0


Clusters = dict[str, tuple[SeenHost, ...]]
"""The hosts of each cluster that Envoy has, the preferred first."""


class _Socket(msgspec.Struct, frozen=True):
    address: str
    port_value: int


class _Pipe(msgspec.Struct, frozen=True):
    path: str


class _Address(msgspec.Struct, frozen=True):
    socket_address: _Socket | None = None
    pipe: _Pipe | None = None


class _Health(msgspec.Struct, frozen=True):
    eds_health_status: str = ""


class _Stat(msgspec.Struct, frozen=True):
    name: str = ""
    value: int = 0


class _HostStatus(msgspec.Struct, frozen=True):
    address: _Address
    health_status: _Health = _Health()
    priority: int = 0
    stats: tuple[_Stat, ...] = ()


class _ClusterStatus(msgspec.Struct, frozen=True):
    name: str
    host_statuses: tuple[_HostStatus, ...] = ()


class _Statuses(msgspec.Struct, frozen=True):
    cluster_statuses: tuple[_ClusterStatus, ...] = ()


class _Options(msgspec.Struct, frozen=True):
    restart_epoch: int = 0


class _ServerInfo(msgspec.Struct, frozen=True):
    state: str
    command_line_options: _Options


_STATUSES = msgspec.json.Decoder(_Statuses, strict=False)


def parse_clusters(body: bytes) -> Clusters:
    """The answer to `CLUSTERS_PATH`. Raises ValueError for anything else."""
    try:
        statuses = _STATUSES.decode(body)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    return {
        cluster.name: tuple(
            _seen(status) for status in sorted(cluster.host_statuses, key=lambda it: it.priority)
        )
        for cluster in statuses.cluster_statuses
    }


def _seen(status: _HostStatus) -> SeenHost:
    draining = status.health_status.eds_health_status == "DRAINING"
    active = sum(stat.value for stat in status.stats if stat.name == "rq_active")
    total = sum(stat.value for stat in status.stats if stat.name == "rq_total")
    return SeenHost(Host(_endpoint(status.address), draining), active, total)


def _endpoint(address: _Address) -> Endpoint | Path:
    if address.socket_address is not None:
        return Endpoint(address.socket_address.address, address.socket_address.port_value)
    if address.pipe is not None:
        return Path(address.pipe.path)
    raise ValueError("a host without an address")


def has(clusters: Clusters, route: str, upstream_list: UpstreamList, activator: Path) -> bool:
    """Whether Envoy has just this list for the route, and the activator behind it."""
    wanted = (
        *(Host(upstream.endpoint, upstream.is_draining) for upstream in upstream_list),
        Host(activator, is_draining=False),
    )
    seen = clusters.get(cluster_name(route))
    return seen is not None and tuple(it.host for it in seen) == wanted


def parse_server(body: bytes) -> Server:
    """The answer to `SERVER_INFO_PATH`. Raises ValueError for anything else."""
    info = msgspec.json.decode(body, type=_ServerInfo, strict=False)
    return Server(info.command_line_options.restart_epoch, info.state == "LIVE")


def parse_requests_active(body: bytes) -> int:
    """The answer to `REQUESTS_ACTIVE_PATH`. Raises ValueError for anything else."""
    name, _, value = body.decode().strip().partition(": ")
    if name != _REQUESTS_ACTIVE:
        raise ValueError(f"Envoy does not know {_REQUESTS_ACTIVE}")
    return int(value)


def services(seen: Iterable[SeenHost], lists: Iterable[UpstreamList]) -> tuple[str, ...]:
    """The services that the hosts belong to, by the endpoints of `lists`."""
    names = {upstream.endpoint: upstream.service for listed in lists for upstream in listed}
    endpoints = [it.host.endpoint for it in seen]
    return tuple(names.get(it, f"port {it.port}") for it in endpoints if isinstance(it, Endpoint))


def traffic(service: str, lists: Mapping[str, UpstreamList], clusters: Clusters) -> tuple[int, int]:
    """Requests that `service` is answering, and those that it was ever sent, over all routes."""
    active = total = 0
    for route, upstreams in lists.items():
        endpoints = {upstream.endpoint for upstream in upstreams if upstream.service == service}
        for seen in clusters.get(cluster_name(route), ()):
            if seen.host.endpoint in endpoints:
                active += seen.requests_active
                total += seen.requests_total
    return active, total


def requests_in_flight(service: str, lists: Mapping[str, UpstreamList], clusters: Clusters) -> int:
    """Requests that `service` is answering, over the `lists` of all routes.

    At least 1 while Envoy could still send it a new one.
    """
    count = 0
    for route, upstreams in lists.items():
        seen_hosts = {it.host.endpoint: it for it in clusters.get(cluster_name(route), ())}
        for upstream in upstreams:
            seen = seen_hosts.get(upstream.endpoint)
            if upstream.service == service and seen is not None:
                is_told = seen.host.is_draining or not upstream.is_draining
                count += seen.requests_active if is_told else max(seen.requests_active, 1)
    return count
