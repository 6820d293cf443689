"""A planned change of Envoy: a successor is started beside it and takes over (its hot restart).

The successor gets the listening sockets from the process before it, so no connection is refused.
Once it serves, it is the service's process, and the one before is retired: it accepts nothing more
and answers what it has, until the successor tells it to end after the drain timeout.

An Envoy that cannot tell its predecessor to end tries for ten seconds and aborts. So we never end
one before that, and where one has died all the same, a socket of ours hears it in its place.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from llmsup.core.service import State
from llmsup.errors import GatewayError, LlmsupError
from llmsup.host import envoy_trial, logfile, ports, procfs
from llmsup.host.admin import Admin
from llmsup.host.process import ExitStatus, Process
from llmsup.keeper import Keeper, Running
from llmsup.services.launch import Launch

log = logging.getLogger(__name__)

LIVE_TIMEOUT_S = 20.0
LOOK_PERIOD_S = 0.01
QUIET_PERIOD_S = 0.1
ATTEMPTS = 2
LAST_LINES = 20
LAST_BYTES = 16 * 1024
SUCCEEDABLE = frozenset({State.READY, State.UNREADY})

Trial = Callable[[Launch], str]
"""What speaks against a launch, found out in about 0.1 s by trying its program."""


class Succession:
    """Lets the process of one keeper be succeeded.

    `predecessor_socket` tells where the process of an epoch hears its successor.
    """

    def __init__(
        self,
        keeper: Keeper,
        admin: Admin,
        *,
        trial: Trial,
        binary: Callable[[Launch], str],
        predecessor_socket: Callable[[int], Path],
    ) -> None:
        self._keeper = keeper
        self._admin = admin
        self._trial = trial
        self._binary = binary
        self._predecessor_socket = predecessor_socket
        self._retired: dict[asyncio.Task[None], _Retired] = {}
        self._stand_in = ExitStack()
        self._one_at_a_time = asyncio.Lock()
        self.trouble = ""

    async def succeed(self) -> bool:
        """Replace the process; False where it cannot be done beside the present one.

        Raises LlmsupError where the successor does not come up; the present process goes on.
        """
        async with self._one_at_a_time:
            self.trouble = ""
            try:
                return await self._succeed()
            except LlmsupError as error:
                self.trouble = f"{error.message}; the one before goes on"
                log.error("service=%s not replaced: %s", self._keeper.unit.name, self.trouble)
                raise

    async def _succeed(self) -> bool:
        unit = self._keeper.unit
        if unit.successor is None or self._keeper.service.state not in SUCCEEDABLE:
            return False
        present = await self._admin.server()
        version = await self._admin.hot_restart_version()
        if present is None or not version:
            log.info("service=%s does not say which successor it could have", unit.name)
            return False
        await self.wait_quiet()  # what comes up now makes the present one end the one before it
        if unit.prepare is not None:
            await asyncio.to_thread(unit.prepare)
        launch = unit.launch()
        if refused := await asyncio.to_thread(self._trial, launch):
            raise GatewayError(f"the new Envoy refuses its configuration: {refused}")
        binary = self._binary(launch)
        if await asyncio.to_thread(envoy_trial.hot_restart_version, binary) != version:
            log.info("service=%s its versions cannot take over from each other", unit.name)
            return False
        for attempt in range(ATTEMPTS):
            try:
                await self._replace(unit.successor(launch, present.epoch + 1), present.epoch)
                return True
            except GatewayError:
                if attempt + 1 == ATTEMPTS:
                    raise
        return False

    async def _replace(self, launch: Launch, epoch: int) -> None:
        """Start a successor, and hand the service over to it once it serves."""
        unit, before = self._keeper.unit, self._keeper.service
        generation = before.generation + 1
        offset = logfile.size_bytes(unit.log)
        with suppress(OSError):  # the output is lost then; said where it is spawned anew
            logfile.append(unit.log, f"--- {unit.name}, generation {generation}")
        process = Process.spawn(launch, log=unit.log, mark=unit.generation_mark(generation))
        endings: list[ExitStatus] = []
        process.watch(endings.append)
        try:
            async with asyncio.timeout(LIVE_TIMEOUT_S):
                while not await self._serves(epoch + 1):
                    if endings:
                        lines = self._said(offset)
                        said = f": {lines[-1]}" if lines[1:] else ""
                        raise GatewayError(f"the new Envoy {endings[0].reason}{said}")
                    if self._keeper.service.generation != before.generation:
                        raise GatewayError("the process to be replaced has ended meanwhile")
                    await asyncio.sleep(LOOK_PERIOD_S)
            if self._keeper.service.state not in SUCCEEDABLE:
                raise GatewayError("the process to be replaced was stopped meanwhile")
            retired = self._keeper.succeed(Running(process, generation, launch, offset))
        except BaseException as error:
            process.kill()
            if isinstance(error, TimeoutError):
                late = f"the new Envoy did not serve within {LIVE_TIMEOUT_S:g} s"
                raise GatewayError(late) from None
            raise
        log.info("service=%s generation=%d takes over", unit.name, generation)
        self._stand_in.close()
        if retired is not None:
            self._retire(_Retired(retired, generation, self._predecessor_socket(epoch)))

    def _said(self, offset: int) -> list[str]:
        log_path = self._keeper.unit.log
        end = logfile.size_bytes(log_path)
        return logfile.lines_between(log_path, offset, end, LAST_LINES, LAST_BYTES)

    async def _serves(self, epoch: int) -> bool:
        server = await self._admin.server()
        is_live = server is not None and server.is_live and server.epoch == epoch
        return is_live and await self._admin.has_listener()

    def adopt_retired(self, process: Process) -> None:
        """See off a process of an earlier generation than the adopted one.

        It may be all there is until that one is ready.
        """
        self._retire(_Retired(process, self._keeper.service.generation))

    async def wait_quiet(self) -> None:
        """Until no retired process has a client any more."""
        port = self._keeper.unit.port or 0
        while not all(each.is_quiet(port) for each in self._retired.values()):
            await asyncio.sleep(QUIET_PERIOD_S)

    def leave_retired(self) -> None:
        """To the next daemon."""
        for task in self._retired:
            task.cancel()

    def _retire(self, retired: "_Retired") -> None:
        task = asyncio.get_running_loop().create_task(self._see_off(retired))
        self._retired[task] = retired
        task.add_done_callback(self._retired.pop)

    async def _see_off(self, retired: "_Retired") -> None:
        unit, clock = self._keeper.unit, asyncio.get_running_loop().time
        while self._keeper.service.state is State.STARTING:  # adopted, and not known to serve
            await asyncio.sleep(LOOK_PERIOD_S)
        due = clock() + unit.policy.drain_timeout_s
        if not await retired.has_ended_within(due + unit.policy.grace_period_s - clock()):
            retired.process.terminate()
            if not await retired.has_ended_within(unit.policy.grace_period_s):
                retired.process.kill()
                await retired.ended.wait()
        has_heir = self._keeper.service.generation == retired.heir
        if retired.socket is not None and has_heir and clock() < due:
            self._stand_in.enter_context(_listening(retired.socket))
        log.info("service=%s its earlier process %d has ended", unit.name, retired.process.pid)


class _Retired:
    """A process that was succeeded by the generation `heir`, which it hears at `socket`."""

    def __init__(self, process: Process, heir: int, socket: Path | None = None) -> None:
        self.process = process
        self.heir = heir
        self.socket = socket
        self.ended = asyncio.Event()
        process.watch(lambda _: self.ended.set())

    def is_quiet(self, port: int) -> bool:
        """Whether it has no connection of a client, and can get none."""
        return self.ended.is_set() or not ports.has_socket(
            port, procfs.descendants(self.process.pid)
        )

    async def has_ended_within(self, timeout_s: float) -> bool:
        """Wait for its end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.ended.wait()
        return self.ended.is_set()


def _listening(path: Path) -> socket.socket:
    """A socket at `path` that takes messages, and never reads them."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    return listener
