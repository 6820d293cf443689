"""Envoy's files, the first of them as a document, and the command that starts Envoy on them.

Envoy is told everything through files that it watches, and never over the network: listeners
(LDS, `envoy_listener`), clusters (CDS) and one upstream list for each route (EDS, both in
`envoy_clusters`), routes (RDS, `envoy_routes`).
The settings that look odd each answer something that was seen to go wrong without them.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from llmsup.core.routing import Endpoint
from llmsup.services.launch import Launch, Target, Via

Document = dict[str, Any]
"""One JSON document, or a part of one."""

TYPE = "type.googleapis.com/"
ALIVE_PATH = "/llmsup/alive"
"""Answered 200 by Envoy itself as soon as its listener works, whatever the services do."""

METADATA = "llmsup"
"""The namespace of what we attach to endpoints."""

LISTENER = "gateway"
ACTIVATOR = ".activator"
"""The cluster of the activator; no route's cluster begins with a dot."""
DOWNSTREAM_CONNECTIONS_MAX = 2000
SPARE_INSTANCES = 3
"""Envoy opens an inotify instance for each upstream list, and these for LDS, CDS and RDS."""

PARENT = (
    "/bin/sh",
    "-c",
    # Passes a SIGTERM to the group by, waits, and ends as Envoy ended.
    'trap : TERM; "$@"; code=$?; trap - TERM; ulimit -c 0; '
    "[ $code -gt 128 ] && kill -$((code - 128)) $$; exit $code",
    "llmsup-gateway",
)
"""What comes before Envoy in its argv: a shell that is its parent, and costs under 1 MB."""

# Both are Envoy's own (hot_restarting_base.cc, hot_restart_impl.cc).
_EPOCHS_APART = 10
_PROCESSES_MAX = 3
# Times the distance it has to stay a positive 32 bit number: a larger one gets another name.
_BASE_IDS = 200_000_000

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Layout:
    """The files of one Envoy, below a directory that only this user can enter."""

    directory: Path

    @property
    def directories(self) -> tuple[Path, ...]:
        """What has to be there before a file is written."""
        listed = self.upstreams("").parent
        return (self.directory, self.temporary, self.routes.parent, listed)

    @property
    def bootstrap(self) -> Path:
        """What Envoy is started with."""
        return self.directory / "bootstrap.json"

    @property
    def holding_bootstrap(self) -> Path:
        """What an Envoy that can hold streams is started with."""
        return self.directory / "bootstrap.hold.json"

    @property
    def listeners(self) -> Path:
        """LDS."""
        return self.directory / "xds" / "listeners.json"

    @property
    def clusters(self) -> Path:
        """CDS."""
        return self.directory / "xds" / "clusters.json"

    @property
    def holding_clusters(self) -> Path:
        """CDS for an Envoy that can hold streams; any other would reject it."""
        return self.directory / "xds" / "clusters.hold.json"

    @property
    def routes(self) -> Path:
        """RDS."""
        return self.directory / "xds" / "routes.json"

    @property
    def temporary(self) -> Path:
        """Where files are written before they take their places; Envoy watches those."""
        return self.directory / "tmp"

    @property
    def admin_socket(self) -> Path:
        """Envoy's admin interface, mode 0600 and never on TCP."""
        return self.directory / "admin.sock"

    @property
    def activator_socket(self) -> Path:
        """Where the daemon answers requests that no upstream answers."""
        return self.directory / "activator.sock"

    @property
    def hot_restart_sockets(self) -> Path:
        """What the names of Envoy's hot restart sockets start with."""
        return self.directory / "hot"

    def upstreams(self, route: str) -> Path:
        """EDS: the upstream list of one route."""
        return self.upstreams_of_cluster(cluster_name(route))

    def upstreams_of_cluster(self, name: str) -> Path:
        """EDS, by the name that Envoy has for the route."""
        return self.directory / "upstreams" / f"{name}.json"


def cluster_name(route: str) -> str:
    """The name of a route as a cluster and a file: any route name gives a safe and distinct one."""
    if _PLAIN_NAME.fullmatch(route):
        return route
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', route)[:40]}.{sha256(route.encode()).hexdigest()[:12]}"


def launch(binary: str, directory: Path, listen: Endpoint, *, holds: bool = False) -> Launch:
    """How Envoy is started; `holds`: as one that can hold streams.

    Under a parent of its own: Envoy asks the kernel for a SIGTERM when its parent dies, and the
    daemon's death would end the gateway (docs/decisions/0016).
    """
    layout = Layout(directory)
    argv = (
        *PARENT,
        binary,
        *("-c", str(layout.holding_bootstrap if holds else layout.bootstrap)),
        *("--concurrency", "2"),
        *("--base-id", str(base_id(directory))),
        *("--socket-path", str(layout.hot_restart_sockets), "--socket-mode", "600"),
        "--reject-unknown-dynamic-fields",
        *("--file-flush-interval-msec", "1000"),
        *("--drain-strategy", "immediate"),
        *("-l", "warning"),
    )
    return Launch(
        argv=argv,
        target=Target(Via.HTTP, host=_reachable(listen.host), port=listen.port, path=ALIVE_PATH),
        ports=(listen.port,),
        configuration=sha256(json.dumps(bootstrap(layout, holds=holds)).encode()).hexdigest(),
    )


def successor(launch: Launch, epoch: int, *, drain_timeout_s: float) -> Launch:
    """The launch of an Envoy that takes over from a live one of the epoch before.

    It tells that one to end after `drain_timeout_s`, or when it ends or is succeeded itself.
    """
    after_s = max(1, math.ceil(drain_timeout_s))
    once = (
        *("--restart-epoch", str(epoch)),
        *("--parent-shutdown-time-s", str(after_s)),
        # It would wait for the answer of one that has died.
        "--skip-hot-restart-parent-stats",
    )
    return replace(launch, once=once)


def program(launch: Launch) -> str:
    """The Envoy that a launch starts."""
    return launch.argv[len(PARENT)]


def base_id(directory: Path) -> int:
    """Keeps the shared memory of several gateways on a machine apart."""
    digest = sha256(str(directory).encode(errors="surrogateescape")).hexdigest()
    return int(digest, 16) % _BASE_IDS


def shared_memory(directory: Path) -> Path:
    """What Envoy leaves behind when it ends, so that a successor can find it."""
    return Path(f"/dev/shm/envoy_shared_memory_{base_id(directory) * _EPOCHS_APART}")  # noqa: S108


def hot_restart_socket(layout: Layout, epoch: int) -> Path:
    """Where the Envoy of this epoch hears what its successor has to say."""
    number = base_id(layout.directory) * _EPOCHS_APART + epoch % _PROCESSES_MAX
    return Path(f"{layout.hot_restart_sockets}_parent_{number}")


def _reachable(host: str) -> str:
    """An address at which a listener on `host` answers from this machine."""
    address = ip_address(host)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host


def discovery(*resources: Document) -> Document:
    """The envelope of every watched file."""
    return {"version_info": "1", "resources": list(resources)}


def file_source(path: Path) -> Document:
    """A watch on one file.

    No `watched_directory`: with it every rename in the directory makes Envoy read every list.
    """
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path)}}


def bootstrap(layout: Layout, *, holds: bool = False) -> Document:
    """What Envoy cannot change without a restart; `holds`: for one that can hold streams."""
    connections = {
        "@type": TYPE + "envoy.extensions.resource_monitors.downstream_connections.v3."
        "DownstreamConnectionsConfig",
        "max_active_downstream_connections": DOWNSTREAM_CONNECTIONS_MAX,
    }
    return {
        "node": {"id": "llmsup", "cluster": "llmsup"},
        "admin": {"address": {"pipe": {"path": str(layout.admin_socket), "mode": 0o600}}},
        "dynamic_resources": {
            "lds_config": file_source(layout.listeners),
            "cds_config": file_source(layout.holding_clusters if holds else layout.clusters),
        },
        # Large bodies would stay in Envoy's memory for ever.
        "memory_allocator_manager": {
            "bytes_to_release": 64 * 1024 * 1024,
            "memory_release_interval": "1s",
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": connections,
                }
            ]
        },
    }


def http_filter(name: str, kind: str, config: Document) -> Document:
    """An HTTP filter of Envoy's own, by its extension's name and its message."""
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {
            "@type": f"{TYPE}envoy.extensions.filters.http.{name}.v3.{kind}",
            **config,
        },
    }
