"""Asking Envoy on its admin socket."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path

from llmsup.core.routing import UpstreamList
from llmsup.host.fetch import fetch
from llmsup.services import envoy_admin
from llmsup.services.envoy_admin import Clusters, Server
from llmsup.services.launch import Target, Via

TIMEOUT_S = 2.0
GONE = (FileNotFoundError, ConnectionRefusedError)
"""What asking an Envoy that has ended raises; anything else may come from one that is busy."""

Ask = Callable[[str, str], Awaitable[bytes]]
"""Requests a path with a method. Raises OSError, or ValueError for what is no good answer."""


class Admin:
    """The admin interface of one Envoy, at the Unix socket `path`."""

    def __init__(self, path: Path, ask: Ask | None = None) -> None:
        self._path = path
        self._ask = ask or self._request

    async def clusters(self) -> Clusters | None:
        """Envoy's view of every upstream list; None where it does not tell."""
        try:
            return envoy_admin.parse_clusters(await self._ask("GET", envoy_admin.CLUSTERS_PATH))
        except (OSError, ValueError):
            return None

    async def in_flight(self, service: str, lists: Mapping[str, UpstreamList]) -> int:
        """Requests that a service of `lists` is answering; 0 where Envoy is gone.

        At least 1 where Envoy does not tell, or could still send it a new one.
        """
        try:
            body = await self._ask("GET", envoy_admin.CLUSTERS_PATH)
            clusters = envoy_admin.parse_clusters(body)
        except GONE:
            return 0
        except (OSError, ValueError):
            return 1
        return envoy_admin.requests_in_flight(service, lists, clusters)

    async def requests_active(self) -> int:
        """Requests of all clients that Envoy has not finished answering; 0 where it is gone.

        At least 1 where it does not tell.
        """
        try:
            body = await self._ask("GET", envoy_admin.REQUESTS_ACTIVE_PATH)
            return envoy_admin.parse_requests_active(body)
        except GONE:
            return 0
        except (OSError, ValueError):
            return 1

    async def server(self) -> Server | None:
        """What Envoy says of itself; None where it does not."""
        try:
            return envoy_admin.parse_server(await self._ask("GET", envoy_admin.SERVER_INFO_PATH))
        except (OSError, ValueError):
            return None

    async def hot_restart_version(self) -> str:
        """Envoys of the same one can take over from each other; empty where it is not told."""
        try:
            body = await self._ask("GET", envoy_admin.HOT_RESTART_VERSION_PATH)
        except (OSError, ValueError):
            return ""
        return body.decode(errors="replace").strip()

    async def has_listener(self) -> bool:
        """Whether Envoy accepted the listener that it was given."""
        try:
            return bool((await self._ask("GET", envoy_admin.LISTENERS_PATH)).strip())
        except (OSError, ValueError):
            return False

    async def drain_listeners(self) -> None:
        """Have every connection closed by the end of its next answer."""
        with suppress(OSError, ValueError):
            await self._ask("POST", envoy_admin.DRAIN_PATH)

    async def _request(self, method: str, path: str) -> bytes:
        target = Target(Via.HTTP, unix_socket=self._path, path=path)
        response = await fetch(target, timeout_s=TIMEOUT_S, method=method)
        if response.status != 200:
            raise ValueError(f"Envoy answered {response.status} to {path}")
        return response.body
