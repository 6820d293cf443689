"""The stack that a drill is about, as it was found, and looking at it while it is broken."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from llmsup.config.listen import parse_listen
from llmsup.config.load import Loaded
from llmsup.config.paths import Paths
from llmsup.config.schema import Service
from llmsup.control.client import Client as Control
from llmsup.control.wire import ServiceInfo, Status
from llmsup.drill.traffic import Client, Load, Record, chat_body
from llmsup.errors import LlmsupError, NotRunningError, UnknownStateError
from llmsup.host import procfs

CLIENTS = 2
PAUSE_S = 0.02
QUIET_S = 1.0
"""Of traffic before the break and after the recovery."""
LOOK_PERIOD_S = 0.02
ANSWER_TIMEOUT_S = 120.0
WHOLE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ground:
    """A whole stack, one route of it that answers chat requests, and that route's services.

    `services` are those of the route that are ready, the preferred one first.
    """

    paths: Paths
    loaded: Loaded
    status: Status
    route: str
    services: tuple[str, ...]
    control: Control = field(repr=False)

    @property
    def first(self) -> str:
        """The service that answers the route while nothing is broken."""
        return self.services[0]

    @property
    def has_fallback(self) -> bool:
        """Whether somebody else answers while the first service is away."""
        return len(self.services) > 1

    @property
    def spec(self) -> Service:
        """The first service as the profile has it."""
        return self.loaded.profile.service[self.first]

    @property
    def address(self) -> tuple[str, int]:
        """Where the gateway is reached from here."""
        host, port = parse_listen(self.status["gateway"])
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104

    @property
    def api_key(self) -> str | None:
        """A key that the gateway lets through."""
        return next(iter(self.loaded.api_keys), None)

    # --- looking

    async def look(self) -> Status:
        """The stack as it is now."""
        return await asyncio.to_thread(self.control.status)

    async def service(self, name: str) -> ServiceInfo:
        """One service as it is now."""
        return of(await self.look(), name)

    async def daemon_pid(self) -> int:
        """The process of the daemon, which a scenario may have replaced."""
        return (await self.look())["daemon"]["pid"]

    async def pid(self, name: str) -> int:
        """The process of a service. Raises LlmsupError where there is none."""
        pid = (await self.service(name))["pid"]
        if pid is None:
            raise LlmsupError(f"{name} has no process any more", hint="llmsup status")
        return pid

    async def until(self, holds: Callable[[Status], bool], within_s: float) -> float | None:
        """When a snapshot first held, in monotonic seconds; None where none did in time."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                status = await self.look()
            except (NotRunningError, UnknownStateError):
                status = None  # the daemon may be what is broken
            now = time.monotonic()
            if status is not None and holds(status):
                return now
            if now > deadline:
                return None
            await asyncio.sleep(LOOK_PERIOD_S)

    async def until_ready(self, name: str, after: int, within_s: float) -> float | None:
        """When a generation of the service later than `after` was ready; None where it failed."""

        def is_over(status: Status) -> bool:
            now = of(status, name)
            is_ready = now["generation"] > after and now["state"] == "ready"
            return is_ready or now["state"] == "failed"

        at = await self.until(is_over, within_s)
        return at if at is not None and (await self.service(name))["state"] == "ready" else None

    async def until_whole(self, within_s: float = WHOLE_TIMEOUT_S) -> float | None:
        """When everything that is wanted was ready."""
        return await self.until(lambda status: not unready(status), within_s)

    # --- asking

    async def ask(self) -> Record:
        """One chat request."""
        client = self._client()
        try:
            return await client.ask(chat_body(self.route))
        finally:
            await client.close()

    @asynccontextmanager
    async def traffic(self, timeout_s: float = ANSWER_TIMEOUT_S) -> AsyncIterator[Load]:
        """Light traffic on the route: undisturbed for a moment before the block and after it."""
        host, port = self.address
        load = Load(
            port,
            chat_body(self.route),
            CLIENTS,
            host,
            pause_s=PAUSE_S,
            timeout_s=timeout_s,
            api_key=self.api_key,
        )
        load.start()
        try:
            await self._undisturbed(load)
            yield load
            await self._undisturbed(load)
            await load.finish()
        finally:
            await load.abandon()

    async def _undisturbed(self, load: Load) -> None:
        """Until each client had at least one more answer."""
        answered, began = len(load.records), time.monotonic()
        while (
            len(load.records) < answered + 2 * CLIENTS and time.monotonic() < began + 60
        ) or time.monotonic() < began + QUIET_S:
            await asyncio.sleep(LOOK_PERIOD_S)

    def _client(self) -> Client:
        return Client(*self.address, ANSWER_TIMEOUT_S, self.api_key)


def unready(status: Status) -> list[str]:
    """The wanted services that are not ready, with the reason."""
    return [
        f"{each['service']} is {each['state']}" + (f": {each['why']}" if each["why"] else "")
        for each in status["services"]
        if each["want"] == "up" and each["state"] != "ready"
    ]


def environ(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    return {os.fsdecode(key): os.fsdecode(text) for key, text in procfs.environ(pid).items()}


def of(status: Status, name: str) -> ServiceInfo:
    """One service of a snapshot."""
    return next(each for each in status["services"] if each["service"] == name)
