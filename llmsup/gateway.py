"""The gateway as the daemon sees it: upstream lists derived, published, and confirmed by Envoy.

`publish` is the one place that writes upstream lists. It never waits: it writes what differs from
what was written before, and `keep_confirmed` then sees to it that Envoy really has it, and mends
what was lost on the way (a failed write, a missed notification, a file that somebody else wrote).
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from llmsup.config.paths import make_private
from llmsup.core import routing
from llmsup.core.routing import Endpoint, Member, Route, UpstreamList
from llmsup.errors import GatewayError
from llmsup.host import envoy_files, envoy_hold
from llmsup.host.admin import Admin, Ask
from llmsup.host.envoy_needs import require_possible
from llmsup.host.envoy_trial import refusal
from llmsup.host.replace import fingerprint, replace_file
from llmsup.services import envoy, envoy_clusters
from llmsup.services.envoy_admin import Clusters, has, services
from llmsup.services.envoy_documents import Build, Documents
from llmsup.services.launch import Launch
from llmsup.troubles import Troubles

log = logging.getLogger(__name__)

POLL_S = 0.003
POLL_MAX_S = 1.0
REWRITE_AFTER_S = 0.25
REWRITE_MAX_S = 10.0
LOOK_AGAIN_S = 10.0
RETRY_S = 1.0
WARM_MAX_S = 2.0
LEAVE_AFTER_S = 5.0

OnConfirmed = Callable[[str, float], None]


@dataclass
class _Pending:
    """A list that Envoy has not been seen to have. Times are monotonic seconds.

    `since`: when the list changed, or None where only Envoy did.
    """

    since: float | None
    rewrite_at: float
    rewrite_after_s: float = REWRITE_AFTER_S

    def postpone(self, now: float) -> None:
        """The next rewrite, each time twice as late."""
        self.rewrite_after_s = min(self.rewrite_after_s * 2, REWRITE_MAX_S)
        self.rewrite_at = now + self.rewrite_after_s


class Gateway:
    """The files of one Envoy, and what it makes of them. Used from one thread.

    `write` replaces a file, `fingerprint` tells whether one has changed, and `ask` requests a path
    from Envoy's admin interface.
    """

    def __init__(
        self,
        directory: Path,
        routes: tuple[Route, ...],
        listen: tuple[str, int],
        api_keys: tuple[str, ...] = (),
        allowed_origins: tuple[str, ...] = (),
        *,
        troubles: Troubles | None = None,
        write: Callable[[Path, Path, bytes], None] = replace_file,
        fingerprint: Callable[[Path], object] = fingerprint,
        ask: Ask | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = envoy.Layout(directory)
        self._routes = routes
        self._documents = Documents(
            self._layout,
            routes,
            Endpoint(*listen),
            api_keys,
            envoy_hold.module(),
            allowed_origins,
        )
        self._write = write
        self._fingerprint = fingerprint
        self._written: dict[Path, object] = {}
        self._admin = Admin(self._layout.admin_socket, ask)
        self._clock = clock
        self._troubles = troubles or Troubles()
        self._changed = asyncio.Event()
        self._pending: dict[str, _Pending] = {}
        self._not_ready: tuple[str, ...] = ()
        self._unwritten: set[Path] = set()
        self._held: frozenset[Path] = frozenset()  # until Envoy has the clusters that they name
        self._goes_over_at = 0.0
        self._looked_at = clock()
        self.desired: dict[str, UpstreamList] = {}
        self.published: dict[str, UpstreamList] = {}
        self.confirmed: dict[str, tuple[str, ...] | None] = {}
        self.last_error = ""

    def prepare(self, *, takes_over: bool = False) -> None:
        """Write every file Envoy needs to start, with empty lists.

        `takes_over`: an Envoy of an earlier daemon is alive and keeps the lists that it has. It
        gets the clusters of new routes before the routes, and those of routes that are no more
        leave after them: a request never meets a route without its cluster.
        Raises GatewayError where Envoy could not work with them.
        """
        if not takes_over:
            require_possible(self._layout, len(self._routes))
        last = envoy_files.LastGiven()
        if takes_over:
            last = envoy_files.read(self._layout, self._routes)
            self._begin_to_go_over(last.clusters)
        for route in self._routes:
            self.desired[route.name] = self.published[route.name] = last.lists.get(route.name, ())
            self.confirmed[route.name] = None
        kept = {self._layout.upstreams(name) for name in last.kept if last.kept[name]}
        try:
            for directory in self._layout.directories:
                make_private(directory)
            for path, build in self._files():
                if path in kept:
                    self._written[path] = self._fingerprint(path)
                else:
                    self._replace(path, build())
        except OSError as error:
            raise GatewayError(
                f"cannot write the gateway's files in {self._layout.directory}: {error.strerror}",
                hint="see that the disk is not full and the directory belongs to you",
            ) from None

    def _begin_to_go_over(self, last: Collection[str]) -> None:
        ours = {envoy.cluster_name(route.name) for route in self._routes}
        self._documents = replace(self._documents, leaving=sorted(set(last) - ours))
        is_new = not ours.issubset(last)
        if is_new:
            self._held = frozenset({self._layout.routes, self._layout.listeners})
        self._goes_over_at = self._clock() + (WARM_MAX_S if is_new else LEAVE_AFTER_S)
        self._changed.set()

    def _go_over(self, clusters: Clusters | None) -> bool:
        """Write what is held once Envoy has all clusters, and let go of the old ones after a while.

        Returns whether anything is left to be done.
        """
        is_due = self._clock() >= self._goes_over_at
        ours = {envoy.cluster_name(route.name) for route in self._routes}
        if self._held and (is_due or ours <= (clusters or {}).keys()):
            self._unwritten |= self._held
            self._held = frozenset()
            self._goes_over_at = self._clock() + LEAVE_AFTER_S
        elif self._documents.leaving and not self._held and is_due:
            self._documents = replace(self._documents, leaving=())
            for path, build in self._documents.clusters():
                if not self._try_replace(path, build()):
                    self._unwritten.add(path)
            envoy_files.remove_others(self._layout, self._routes)
        return bool(self._held or self._documents.leaving)

    @property
    def is_settled(self) -> bool:
        """Whether Envoy has been seen to have every list, and was given everything else."""
        return not (self._pending or self._held or self._unwritten)

    def trial(self, launch: Launch) -> str:
        """What the Envoy of `launch` says against its files, empty for nothing. Blocks for 0.1 s.

        Raises LaunchError, as `envoy_trial.refusal`.
        """
        holds = str(self._layout.holding_bootstrap) in launch.argv
        path = self._layout.temporary / "trial.json"
        content = msgspec.json.encode(self._documents.trial(holds=holds))
        try:
            self._write(path, path.with_suffix(".new"), content)
        except OSError as error:
            return f"cannot write {path}: {error.strerror or error}"
        return refusal(envoy.program(launch), "-c", str(path))

    def predecessor_socket(self, epoch: int) -> Path:
        """Where the Envoy of this epoch hears its successor."""
        return envoy.hot_restart_socket(self._layout, epoch)

    @property
    def admin(self) -> Admin:
        """Envoy's admin interface."""
        return self._admin

    def _files(self) -> Iterator[tuple[Path, Build]]:
        """Every file as it should be by now."""
        yield from self._documents.lists(self.published)
        for path, build in self._documents.tables(self._not_ready):
            if path not in self._held:
                yield path, build

    def remove(self) -> None:
        """Remove every file. Envoy has ended, and `prepare` comes before the next one."""
        shutil.rmtree(self._layout.directory, ignore_errors=True)

    def _replace(self, path: Path, document: envoy.Document) -> None:
        self._write(path, self._layout.temporary / path.name, msgspec.json.encode(document))
        self._written[path] = self._fingerprint(path)

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
        if not_ready != self._not_ready:
            self._unwritten.add(self._layout.routes)
        self.desired, self._not_ready = wanted, not_ready
        written = self._write_changes()
        self._tell_trouble()
        if self.last_error:
            self._changed.set()
        return written

    def _tell_trouble(self) -> None:
        self._troubles.tell("the gateway goes by old files", self.last_error)

    def _write_changes(self) -> tuple[str, ...]:
        """Bring the files up to date. Returns the routes whose lists were written."""
        self.last_error = ""
        written = tuple(filter(self._write_list, routing.diff(self.desired, self.published)))
        if self._unwritten:
            for path, build in self._documents.tables(self._not_ready):
                is_due = path in self._unwritten and path not in self._held
                if is_due and self._try_replace(path, build()):
                    self._unwritten.discard(path)
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

    def wake(self) -> None:
        """See to it that Envoy, which was started, has every document whatever it read first."""
        self._unwritten.update(path for path, _ in self._documents.tables(self._not_ready))
        self._doubt(*(route.name for route in self._routes))
        self.confirmed = dict.fromkeys(self.confirmed)

    def _doubt(self, *routes: str) -> None:
        """Compare these lists with Envoy's view, and mend those that it does not have."""
        rewrite_at = self._clock() + REWRITE_AFTER_S
        for route in routes:
            self._pending.setdefault(route, _Pending(None, rewrite_at))
        if routes:
            self._changed.set()

    def look_again(self, clusters: Clusters | None) -> None:
        """Mend what somebody else wrote: files, and lists that Envoy has from elsewhere."""
        self.last_error = ""
        self._mend_files()
        self._tell_trouble()
        self._note(clusters)
        if clusters is not None:  # else Envoy is away, and `wake` follows
            names = (route.name for route in self._routes)
            self._doubt(*(name for name in names if not self._has_desired(name, clusters)))

    async def keep_confirmed(self, on_confirmed: OnConfirmed) -> None:
        """See to it, until cancelled, that Envoy has what is desired.

        Calls `on_confirmed(route, elapsed_s)` when Envoy has a list that changed.
        """
        is_failing = False
        while True:
            try:
                await self._wait_for_doubt()
                await self._settle_all(on_confirmed)
                is_failing = False
            except Exception:
                if not is_failing:
                    log.exception("the upstream lists could not be confirmed")
                is_failing = True
                self._changed.set()
                await asyncio.sleep(RETRY_S)

    async def _wait_for_doubt(self) -> None:
        """Until something changed here, or is seen to have been changed by somebody else."""
        while not self._changed.is_set():
            try:
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._changed.wait()
            except TimeoutError:
                self.look_again(await self.clusters())

    async def _settle_all(self, on_confirmed: OnConfirmed) -> None:
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
        is_going_over = self._go_over(clusters)
        if self._write_changes():
            self._changed.set()
        self._note(clusters)
        now = self._clock()
        if now - self._looked_at >= LOOK_AGAIN_S:
            self._mend_files()
        for route, pending in tuple(self._pending.items()):
            if self._has_desired(route, clusters):
                del self._pending[route]
                if pending.since is not None:
                    on_confirmed(route, now - pending.since)
            elif clusters is not None and now >= pending.rewrite_at:
                pending.postpone(now)
                self._mend(route, clusters)
        self._tell_trouble()
        return bool(self._pending or self.last_error or is_going_over)

    def _mend_files(self) -> None:
        """Write again what is no longer as it was written here."""
        self._looked_at = self._clock()
        for path, build in self._files():
            if self._fingerprint(path) != self._written.get(path):
                self._try_replace(path, build())

    def _mend(self, route: str, clusters: Clusters) -> None:
        """Write the list of a route again, and what Envoy needs to look at it."""
        if self._write_list(route):
            self._changed.set()
        if envoy.cluster_name(route) not in clusters:
            # Rejected for its list: Envoy does not look again when the list is mended.
            for path, build in self._documents.clusters():
                self._try_replace(path, build())

    def _has_desired(self, route: str, clusters: Clusters | None) -> bool:
        is_written = self.published[route] == self.desired[route]
        return is_written and has(clusters or {}, route, self.desired[route])

    def _note(self, clusters: Clusters | None) -> None:
        """Keep Envoy's view as `confirmed`."""
        lists = (*self.published.values(), *self.desired.values())
        for route in self._routes:
            seen = (clusters or {}).get(envoy.cluster_name(route.name))
            self.confirmed[route.name] = None if seen is None else services(seen, lists)

    async def in_flight(self, service: str, routes: Container[str] | None = None) -> int:
        """As `Admin.in_flight`, of these routes or of all; 0 for a service that is in no list."""
        lists = {
            route: listed
            for route, listed in self.desired.items()
            if routes is None or route in routes
        }
        if not any(it.service == service for listed in lists.values() for it in listed):
            return 0
        return await self._admin.in_flight(service, lists)

    async def requests_active(self) -> int:
        """Requests of all clients that are not answered; 0 where Envoy is gone, 1 if unknown."""
        return await self._admin.requests_active()

    async def drain_listeners(self) -> None:
        """Have every connection closed by the end of its next answer."""
        await self._admin.drain_listeners()

    async def clusters(self) -> Clusters | None:
        """Envoy's view of every upstream list; None where it does not tell."""
        return await self._admin.clusters()
