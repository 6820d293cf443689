"""Keeps one service: a mailbox of events, `step` on each, and the actions performed.

A keeper is the only writer of its Service. Events are handled in the order they were posted, one
at a time, on the event loop; whoever posts gets control back before or after, never in between.
Between the death of a process and the next execve there is no await.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from llmsup.config.schema import Readiness
from llmsup.core import events, health, lifecycle
from llmsup.core.events import Action, Event
from llmsup.core.health import Health, Outcome, ProbeResult
from llmsup.core.service import Policy, Service, State
from llmsup.errors import LaunchError
from llmsup.host import logfile, ports
from llmsup.host.probe import probe
from llmsup.host.process import ExitStatus, Process, carries_mark, end_marked
from llmsup.services.launch import Launch, Via

log = logging.getLogger(__name__)

FIRST_PROBE_S = 0.01
PROBE_GROWTH = 1.5
STARTING_PERIOD_MAX_S = 0.25
PROGRESS_PERIOD_S = 1.0
SETTLE_MAX_S = 1.0
EXPECTED_SILENCE_S = 0.5
PORT_RELEASE_TIMEOUT_S = 1.0
PORT_LOOK_PERIOD_S = 0.01


@dataclass(frozen=True)
class Unit:
    """What a keeper has to know of its service. `launch` may raise LaunchError."""

    name: str
    kind: str
    launch: Callable[[], Launch]
    log: Path
    mark: str
    policy: Policy = field(default_factory=Policy)
    readiness: Readiness = field(default_factory=Readiness)
    depends_on: tuple[str, ...] = ()
    port: int | None = None
    model: str | None = None
    gpu_layers: int | str | None = None


Change = Callable[[Service, Service], None]
"""Told (before, after) once a step changed the service, before its actions are performed."""

DrainRequests = Callable[[str], Awaitable[None]]
"""Returns when the named service has no request in flight."""


class Keeper:
    """One service and its process."""

    def __init__(self, unit: Unit, *, on_change: Change, drain_requests: DrainRequests) -> None:
        self.unit = unit
        self.service = Service(unit.name, unit.policy)
        self._on_change = on_change
        self._drain_requests = drain_requests
        self._loop = asyncio.get_running_loop()
        self._mailbox: deque[Event] = deque()
        self._is_stepping = False
        self._process: Process | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._attendants: set[asyncio.Task[None]] = set()
        self._sweeps: set[asyncio.Task[None]] = set()

    def post(self, event: Event) -> None:
        """Handle `event` after those already posted."""
        self._mailbox.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._mailbox:
                self._step(self._mailbox.popleft())
        finally:
            self._is_stepping = False

    async def wait_swept(self) -> None:
        """Until no descendant that left its process group is being looked for any more."""
        while self._sweeps:
            await asyncio.wait(self._sweeps)

    def _step(self, event: Event) -> None:
        before = self.service
        self.service, actions = lifecycle.step(before, event, self._loop.time())
        self._set_timer()
        if self.service != before:
            self._on_change(before, self.service)
        for action in actions:
            self._perform(action)

    def _set_timer(self) -> None:
        at = self.service.timer_at
        if self._timer is not None:
            if self._timer.when() == at and not self._timer.cancelled():
                return
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer = self._loop.call_at(at, self.post, events.TimerElapsed(at))

    def _perform(self, action: Action) -> None:
        match action:
            case events.Spawn(generation):
                self._spawn(generation)
            case events.Drain(generation):
                self._attend(self._drain(generation))
            case events.Terminate(generation):
                self._dismiss()
                if self._process is not None:
                    self._process.terminate()
                else:
                    self.post(events.SpawnFailed(generation, "stopped before it was spawned"))
            case events.Kill():
                if self._process is not None:
                    self._process.kill()

    # --- spawning

    def _spawn(self, generation: int) -> None:
        self._dismiss()
        try:
            launch = self.unit.launch()
            if _held_port(launch) is None:
                self._spawn_now(generation, launch)
            else:
                self._attend(self._spawn_when_free(generation, launch))
        except LaunchError as error:
            self._fail_spawn(generation, error)

    def _spawn_now(self, generation: int, launch: Launch) -> None:
        offset = logfile.size_bytes(self.unit.log)
        mark = _generation_mark(self.unit, generation)
        process = Process.spawn(launch, log=self.unit.log, mark=mark)
        self._process = process

        def on_exit(status: ExitStatus) -> None:
            self._note_exit(generation, status, offset)

        process.watch(on_exit)
        self.post(events.Spawned(generation, process.pid))
        self._attend(self._attend_readiness(generation, launch, process))

    async def _spawn_when_free(self, generation: int, launch: Launch) -> None:
        """A port is held: by a member of the last generation that is dying, or by a stranger."""
        patience_s = min(PORT_RELEASE_TIMEOUT_S, self.unit.policy.stall_timeout_s / 2)
        deadline = self._loop.time() + patience_s
        while (held := _held_port(launch)) is not None and self._loop.time() < deadline:
            await asyncio.sleep(PORT_LOOK_PERIOD_S)
        try:
            if held is not None:
                raise LaunchError(held)
            self._spawn_now(generation, launch)
        except LaunchError as error:
            self._fail_spawn(generation, error)

    def _fail_spawn(self, generation: int, error: LaunchError) -> None:
        reason = f"{error.message} ({error.hint})" if error.hint else error.message
        self.post(events.SpawnFailed(generation, reason, error.permanent))

    def _note_exit(self, generation: int, status: ExitStatus, log_offset: int) -> None:
        self._dismiss()
        self._process = None
        reason = status.reason
        if status.code:
            words = logfile.last_words(self.unit.log, log_offset)
            reason = f"{reason}: {words}" if words else reason
        self.post(events.Exited(generation, reason, clean=status.clean))
        self._sweep(generation)

    def _sweep(self, generation: int) -> None:
        """End descendants of the generation that left its process group; they carry its mark."""
        sweep = self._loop.create_task(self._end_strays(_generation_mark(self.unit, generation)))
        self._sweeps.add(sweep)
        sweep.add_done_callback(self._sweeps.discard)

    async def _end_strays(self, mark: str) -> None:
        ended = await asyncio.to_thread(end_marked, mark, 1.0)
        if ended:
            log.warning("service=%s ended %d stray processes", self.unit.name, ended)

    # --- attendants: tasks that serve the present generation and end with it

    def _attend(self, work: Coroutine[object, object, None]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception:
                log.exception("service=%s an attendant broke", self.unit.name)

        task = self._loop.create_task(run())
        self._attendants.add(task)
        task.add_done_callback(self._attendants.discard)

    def _dismiss(self) -> None:
        current = asyncio.current_task()  # None in a callback of the loop
        for task in self._attendants:
            if task is not current:
                task.cancel()

    async def _drain(self, generation: int) -> None:
        await self._drain_requests(self.unit.name)
        self.post(events.Drained(generation))

    async def _attend_readiness(self, generation: int, launch: Launch, process: Process) -> None:
        readiness = self.unit.readiness
        mark = _generation_mark(self.unit, generation)
        condition = Health()
        pause_s = FIRST_PROBE_S
        stall_timeout_s = self.unit.policy.stall_timeout_s
        look_every_s = min(PROGRESS_PERIOD_S, stall_timeout_s / 4)
        progress = _Progress(process, look_every_s, self._loop.time())
        if launch.target.via is Via.ALIVE:
            await asyncio.sleep(min(readiness.period_s, SETTLE_MAX_S, stall_timeout_s / 2))
        while True:
            result = await probe(launch.target, readiness.timeout_s)
            if result.outcome is Outcome.PASSED and not condition.is_ready:
                result = _shared(launch, process, mark) or result
            after = health.observe(condition, result, readiness)
            if after.is_ready and not condition.is_ready:
                self.post(events.BecameReady(generation))
            elif condition.is_ready and not after.is_ready:
                why = f"{after.failures} probes failed: {result.reason}"
                self.post(events.BecameUnready(generation, why))
            condition = after
            if self.service.state is State.STARTING:
                age_s = self._loop.time() - self.service.started_at
                if result.reason != self.service.why and age_s > EXPECTED_SILENCE_S:
                    self.post(events.ProbeFailed(generation, result.reason))
                if progress.was_made(self._loop.time()):
                    self.post(events.Progressed(generation))
                pause_s = min(pause_s * PROBE_GROWTH, STARTING_PERIOD_MAX_S, readiness.period_s)
            else:
                pause_s = readiness.period_s
            await asyncio.sleep(pause_s)


class _Progress:
    """Whether a starting process did something lately; not looked at more often than needed."""

    def __init__(self, process: Process, look_every_s: float, now: float) -> None:
        self._process = process
        self._look_every_s = look_every_s
        self._looked_at = now
        self._last = process.progress()

    def was_made(self, now: float) -> bool:
        if now - self._looked_at < self._look_every_s:
            return False
        self._looked_at = now
        last, self._last = self._last, self._process.progress()
        return self._last != last


def _generation_mark(unit: Unit, generation: int) -> str:
    """The mark of one generation; closed, so that 1 is no prefix of 10."""
    return f"{unit.mark}{generation}:"


def _held_port(launch: Launch) -> str | None:
    """A sentence naming who holds a port that the launch needs, or None."""
    for port in launch.ports:
        for owner in ports.owners(port):
            return f"port {port} is held by {ports.describe(owner)}"
    return None


def _shared(launch: Launch, process: Process, mark: str) -> ProbeResult | None:
    """A failure where a stranger listens on the port, too: SO_REUSEPORT would let them.

    Only processes of our own user can share a port so, and those can be seen; a listener that
    cannot (the proxy of a container, say) is what the service itself has set up.
    """
    for port in launch.ports:
        for owner in ports.strangers(port, process.pid):
            if owner.pid is not None and not carries_mark(owner.pid, mark):
                reason = f"port {port} is also held by {ports.describe(owner)}"
                return ProbeResult(Outcome.FAILED, reason)
    return None
