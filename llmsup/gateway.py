"""The gateway as the daemon sees it: upstream lists derived, published, and confirmed by Envoy.

`publish` is the one place that writes upstream lists. It never waits: it writes what differs from
what was written before, and `keep_confirmed` then sees to it that Envoy really has it, and mends
what was lost on the way (a failed write, a missed notification, a file that somebody else wrote).
"""

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmsup.config.paths import SOCKET_PATH_MAX_BYTES
from llmsup.core import routing
from llmsup.core.routing import Endpoint, Member, Route, UpstreamList
from llmsup.errors import GatewayError
from llmsup.host import inotify
from llmsup.host.fetch import fetch
from llmsup.host.replace import replace_file
from llmsup.services import envoy, envoy_admin, envoy_clusters, envoy_listener
from llmsup.services.envoy_admin import Clusters
from llmsup.services.envoy_routes import route_table
from llmsup.services.launch import Target, Via

ADMIN_TIMEOUT_S = 2.0
POLL_S = 0.003
POLL_MAX_S = 1.0
REWRITE_AFTER_S = 0.25
REWRITE_MAX_S = 10.0

Write = Callable[[Path, Path, bytes], None]
Ask = Callable[[str, str], Awaitable[bytes]]
OnConfirmed = Callable[[str, float], None]


@dataclass
class _Pending:
    """A list that Envoy has not been seen to have. Times are monotonic seconds.

    `since`: when the list changed, or None where only Envoy did.
    """

    since: float | None
    rewrite_at: float
    rewrite_after_s: float = REWRITE_AFTER_S


class Gateway:
    """The files of one Envoy, and what it makes of them. Used from one thread.

    `write` replaces a file and `ask` requests a path from Envoy's admin interface.
    """

    def __init__(
        self,
        directory: Path,
        routes: tuple[Route, ...],
        listen: tuple[str, int],
        api_keys: tuple[str, ...] = (),
        *,
        write: Write | None = None,
        ask: Ask | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = envoy.Layout(directory)
        self._routes = routes
        self._listen = Endpoint(*listen)
        self._api_keys = api_keys
        self._write = write or replace_file
        self._ask = ask or self._ask_admin
        self._clock = clock
        self._changed = asyncio.Event()
        self._pending: dict[str, _Pending] = {}
        self._not_ready: tuple[str, ...] = ()
        self._published_not_ready: tuple[str, ...] = ()
        self.desired: dict[str, UpstreamList] = {}
        self.published: dict[str, UpstreamList] = {}
        self.confirmed: dict[str, tuple[str, ...] | None] = {}
        self.last_error = ""

    def prepare(self) -> None:
        """Write every file Envoy needs to start, with empty lists.

        Raises GatewayError where Envoy could not work with them.
        """
        self._ensure_possible()
        try:
            for directory in self._layout.directories:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path, document in self._documents():
                self._replace(path, document)
        except OSError as error:
            raise GatewayError(
                f"cannot write the gateway's files in {self._layout.directory}: {error.strerror}",
                hint="see that the disk is not full and the directory belongs to you",
            ) from None
        for route in self._routes:
            self.desired[route.name] = self.published[route.name] = ()
            self.confirmed[route.name] = None

    def _documents(self) -> Iterator[tuple[Path, envoy.Document]]:
        """Every file, lists before the clusters: one whose list is missing stays rejected."""
        layout, routes, keys = self._layout, self._routes, self._api_keys
        for route in routes:
            yield layout.upstreams(route.name), envoy_clusters.upstreams(route.name, ())
        yield layout.clusters, envoy_clusters.clusters(layout, routes)
        yield layout.routes, route_table(routes, keys, ())
        yield layout.listeners, envoy_listener.listeners(layout, self._listen, needs_key=bool(keys))
        yield layout.bootstrap, envoy.bootstrap(layout)

    def remove(self) -> None:
        """Remove every file. Envoy has ended, and `prepare` comes before the next one."""
        shutil.rmtree(self._layout.directory, ignore_errors=True)
        with suppress(OSError):
            self._layout.shared_memory.unlink()

    def _ensure_possible(self) -> None:
        for socket in self._layout.sockets:
            if len(os.fsencode(socket)) > SOCKET_PATH_MAX_BYTES:
                raise GatewayError(
                    f"the path {socket} is too long for a socket",
                    hint="set LLMSUP_HOME to a shorter directory",
                )
        needed = len(self._routes) + envoy.SPARE_INSTANCES
        left = inotify.instances_left()
        # Without this check Envoy aborts at start, and does not say why.
        if left is not None and left < needed:
            raise GatewayError(
                f"{len(self._routes)} routes need {needed} inotify instances and {left} are left",
                hint="raise the limit: sudo sysctl fs.inotify.max_user_instances=1024",
            )

    def _replace(self, path: Path, document: envoy.Document) -> None:
        self._write(path, self._layout.temporary / path.name, msgspec.json.encode(document))

    # --- publishing -----------------------------------------------------------------------------

    def publish(
        self, members: Mapping[str, Member], not_ready: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """Derive the upstream lists and write those that changed. Returns their routes' names.

        A write that fails is kept in `last_error` and tried again by `keep_confirmed`.
        """
        now = self._clock()
        wanted = routing.desired(self._routes, members)
        for name in routing.diff(wanted, self.desired):
            self._pending[name] = _Pending(since=now, rewrite_at=now + REWRITE_AFTER_S)
            self.confirmed[name] = None
            self._changed.set()
        self.desired, self._not_ready = wanted, not_ready
        written = self._write_changes()
        if self.last_error:
            self._changed.set()
        return written

    def _write_changes(self) -> tuple[str, ...]:
        """Bring the files up to date. Returns the routes whose lists were written."""
        self.last_error = ""
        written = tuple(filter(self._write_list, routing.diff(self.desired, self.published)))
        if self._not_ready != self._published_not_ready:
            table = route_table(self._routes, self._api_keys, self._not_ready)
            if self._try_replace(self._layout.routes, table):
                self._published_not_ready = self._not_ready
        return written

    def _write_list(self, route: str) -> bool:
        document = envoy_clusters.upstreams(route, self.desired[route])
        if is_written := self._try_replace(self._layout.upstreams(route), document):
            self.published[route] = self.desired[route]
        return is_written

    def _try_replace(self, path: Path, document: envoy.Document) -> bool:
        try:
            self._replace(path, document)
        except OSError as error:
            self.last_error = f"cannot write {path}: {error.strerror or error}"
            return False
        return True

    # --- confirming -----------------------------------------------------------------------------

    def wake(self) -> None:
        """Compare every list with Envoy's view again: Envoy was started, or may have lost one."""
        rewrite_at = self._clock() + REWRITE_AFTER_S
        for route in self._routes:
            self._pending.setdefault(route.name, _Pending(None, rewrite_at))
        self.confirmed = dict.fromkeys(self.confirmed)
        self._changed.set()

    async def confirm(self) -> dict[str, tuple[str, ...] | None]:
        """The services in each route's list as Envoy has it; None: not known."""
        self._note(await self.clusters())
        return dict(self.confirmed)

    async def keep_confirmed(self, on_confirmed: OnConfirmed) -> None:
        """See to it, until cancelled, that Envoy has what is desired.

        Calls `on_confirmed(route, elapsed_s)` when Envoy has a list that changed.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            wait_s = POLL_S
            while self.settle(await self.clusters(), on_confirmed):
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
                wait_s = POLL_S if self._changed.is_set() else min(wait_s * 1.5, POLL_MAX_S)
                self._changed.clear()

    def settle(self, clusters: Clusters | None, on_confirmed: OnConfirmed) -> bool:
        """One step towards what is desired, from Envoy's view of it (None: Envoy is away).

        Returns whether anything is left to be done.
        """
        if self._write_changes():
            self._changed.set()
        self._note(clusters)
        now = self._clock()
        for route, pending in tuple(self._pending.items()):
            if self._has_desired(route, clusters):
                del self._pending[route]
                if pending.since is not None:
                    on_confirmed(route, now - pending.since)
            elif clusters is not None and now >= pending.rewrite_at:
                pending.rewrite_after_s = min(pending.rewrite_after_s * 2, REWRITE_MAX_S)
                pending.rewrite_at = now + pending.rewrite_after_s
                if self._write_list(route):
                    self._changed.set()
                if envoy.cluster_name(route) not in clusters:
                    # Rejected for its list: Envoy does not look again when the list is mended.
                    document = envoy_clusters.clusters(self._layout, self._routes)
                    self._try_replace(self._layout.clusters, document)
        return bool(self._pending or self.last_error)

    def _has_desired(self, route: str, clusters: Clusters | None) -> bool:
        if clusters is None or self.published[route] != self.desired[route]:
            return False
        seen = clusters.get(envoy.cluster_name(route))
        wanted = envoy_admin.hosts(self.desired[route])
        return seen is not None and tuple(it.host for it in seen) == wanted

    def _note(self, clusters: Clusters | None) -> None:
        """Keep Envoy's view as `confirmed`."""
        services = {
            upstream.endpoint: upstream.service
            for upstreams in (*self.published.values(), *self.desired.values())
            for upstream in upstreams
        }
        for route in self._routes:
            seen = (clusters or {}).get(envoy.cluster_name(route.name))
            self.confirmed[route.name] = None
            if seen is not None:
                self.confirmed[route.name] = tuple(
                    services.get(it.host.endpoint, f"port {it.host.endpoint.port}") for it in seen
                )

    async def in_flight(self, service: str) -> int:
        """Requests that `service` is answering; 0 where Envoy is gone.

        At least 1 while Envoy could still send it a new one.
        """
        clusters = await self.clusters() or {}
        count = 0
        for route, upstreams in self.desired.items():
            hosts = {it.host.endpoint: it for it in clusters.get(envoy.cluster_name(route), ())}
            for upstream in upstreams:
                seen = hosts.get(upstream.endpoint)
                if upstream.service == service and seen is not None:
                    is_told = seen.host.is_draining or not upstream.is_draining
                    count += seen.requests_active if is_told else max(seen.requests_active, 1)
        return count

    async def requests_active(self) -> int:
        """Requests of all clients that Envoy has not finished answering; 0 where it is gone."""
        try:
            body = await self._ask("GET", envoy_admin.REQUESTS_ACTIVE_PATH)
            return envoy_admin.parse_requests_active(body)
        except (OSError, ValueError):
            return 0

    async def drain_listeners(self) -> None:
        """Have every connection closed by the end of its next answer."""
        with suppress(OSError, ValueError):
            await self._ask("POST", envoy_admin.DRAIN_PATH)

    async def clusters(self) -> Clusters | None:
        """Envoy's view of every upstream list; None where it is away."""
        try:
            return envoy_admin.parse_clusters(await self._ask("GET", envoy_admin.CLUSTERS_PATH))
        except (OSError, ValueError):
            return None

    async def _ask_admin(self, method: str, path: str) -> bytes:
        target = Target(Via.HTTP, unix_socket=self._layout.admin_socket, path=path)
        response = await fetch(target, timeout_s=ADMIN_TIMEOUT_S, method=method)
        if response.status != 200:
            raise ValueError(f"Envoy answered {response.status} to {path}")
        return response.body
