"""Keeps one service: a mailbox of events, `step` on each, and the actions performed.

A keeper is the only writer of its Service. Events are handled in the order they were posted, one
at a time, on the event loop; whoever posts gets control back before or after, never in between.
Between the death of a process and the next execve there is no await.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from llmsup.attendance import Attendance, Unit
from llmsup.card_use import CardUse
from llmsup.core import events, lifecycle
from llmsup.core.diagnosis import (
    KILLING,
    MODEL_CAUSES,
    Cause,
    Diagnosis,
    Ending,
    diagnose,
    with_holder,
)
from llmsup.core.events import Action, Event
from llmsup.core.grant import UNPLANNED, Grant
from llmsup.core.health import Outcome
from llmsup.core.service import Service, State
from llmsup.errors import LaunchError, NoRoomError
from llmsup.host import gguf, logfile, ports
from llmsup.host.memory import Remembered
from llmsup.host.probe import probe
from llmsup.host.process import ExitStatus, Found, Process, end_marked
from llmsup.inquest import Inquest, OnDeath
from llmsup.services import llama_server
from llmsup.services.launch import Launch, Target, Via
from llmsup.troubles import Troubles
from llmsup.warmth import Warmth

log = logging.getLogger(__name__)

PORT_RELEASE_TIMEOUT_S = 1.0
PORT_LOOK_PERIOD_S = 0.01
LEAVING_LOOK_PERIOD_S = 0.1
TURN_FIRST_LOOK_S = 0.05
TURN_LOOK_PERIOD_S = 0.5
STRAY_GRACE_S = 1.0
LAST_LINES = 200
LAST_BYTES = 64 * 1024
LOADING_LINES = 4000
LOADING_BYTES = 1024 * 1024

Change = Callable[[Service, Service], None]
"""Told (before, after) once a step changed the service, before its actions are performed."""

DrainRequests = Callable[[str], Awaitable[None]]
"""Returns when the named service has no request in flight."""

IsLeaving = Callable[[int], bool]
"""Whether the process is being ended by this daemon, without being a service's any more."""


@dataclass(frozen=True)
class Running:
    """A process, of which generation, how it was started, and where its output begins."""

    process: Process
    generation: int
    launch: Launch
    log_offset: int


class Keeper:
    """One service and its process."""

    def __init__(
        self,
        unit: Unit,
        remembered: Remembered | None,
        *,
        on_change: Change,
        on_death: OnDeath,
        drain_requests: DrainRequests,
        warmth: Warmth,
        troubles: Troubles,
        is_leaving: IsLeaving,
        card: CardUse,
    ) -> None:
        self.unit = unit
        self.model = unit.model  # of the process, as far as that is known
        self.port = unit.port  # that of the process; an adopted one may have been given another
        self.launch: Launch | None = None  # of the process, where it is known
        self.service = _restored(unit, remembered)
        self._remembered = remembered
        self._last_port = remembered.port if remembered else None
        self._on_change = on_change
        self._on_death = on_death
        self._drain_requests = drain_requests
        self._warmth = warmth
        self._troubles = troubles
        self._is_leaving = is_leaving
        self._card = card
        self._loop = asyncio.get_running_loop()
        self._mailbox: deque[Event] = deque()
        self._is_stepping = False
        self._process: Process | None = None
        self._running: Running | None = None
        self._inquest = Inquest(unit)
        self._timer: asyncio.TimerHandle | None = None
        self.log_start: int | None = None  # of the process; that of an adopted one is not known
        self._attendants: set[asyncio.Task[None]] = set()
        self._sweeps: set[asyncio.Task[None]] = set()
        self._held_back: Event | None = None  # an exit that is told once its strays are gone

    @property
    def warm_tokens(self) -> int:
        """How many tokens of its prompt cache the process has got back, by its own word."""
        return self._warmth.tokens(self.service)

    def post(self, event: Event) -> None:
        """Handle `event` after those already posted. Never raises: keepers post to each other."""
        self._mailbox.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        while self._mailbox:
            event = self._mailbox.popleft()
            try:
                self._step(event)
            except Exception:
                log.exception("service=%s %s broke", self.unit.name, event)
        self._is_stepping = False

    def adopt(self, found: Found) -> bool | None:
        """Keep a process that an earlier daemon started.

        Returns whether it was started as it would be now; None where it cannot be kept.
        """
        grant, conforms = UNPLANNED, True
        try:
            if self.unit.uses_card:
                grant, conforms = self._card.recall(self.unit.name, found.grant)
            launch = self.unit.launch(grant)
        except Exception as error:
            log.error("service=%s its process cannot be adopted: %s", self.unit.name, error)
            return None
        process = Process.adopt(found.pid, log=self.unit.log, mark=found.mark)
        if process is None:
            return None
        is_current = conforms and found.digest == launch.digest
        if not is_current and self._last_port and self.unit.kind != "envoy":
            # It is probed, and drained, where it listens, until it is replaced. Envoy is told its
            # address while it lives.
            self.port = self._last_port
            target = replace(launch.target, port=self.port)
            launch = replace(launch, target=target, ports=(self.port,))
        launch = replace(launch, first_prompt=None)
        self.post(events.Adopted(found.generation, found.pid))
        if self.unit.uses_card:
            last = self._remembered
            is_its = last is not None and last.generation == found.generation
            measured_bytes = last.measured_bytes if last and is_its else None
            self._card.adopt(self.unit.name, found.generation, grant, measured_bytes)
        self.launch = launch if is_current else None
        self._inquest.note_launch(self.launch)
        self._inquest.note_process(process.pid, None)
        offset = logfile.size_bytes(self.unit.log)
        self._attend_to(process, found.generation, launch, offset)
        return is_current

    def succeed(self, successor: Running) -> Process | None:
        """Keep a process that serves already in place of the present one.

        Returns the one before, which is the caller's now; None where there was none. Raises
        LaunchError while the service is being stopped.
        """
        before, pid = self._process, successor.process.pid
        event = events.Succeeded(successor.generation, pid)
        if lifecycle.step(self.service, event, self._loop.time())[0].pid != pid:
            raise LaunchError("the process to be replaced was stopped meanwhile")
        # First: who is told of the change finds it where it listens.
        self.port, self.model = self.unit.port, self.unit.model
        self.launch, self.log_start = successor.launch, successor.log_offset
        self.post(event)
        self._dismiss()
        if before is not None:
            before.disown()
        self._inquest.note_launch(successor.launch)
        self._inquest.note_process(pid, successor.log_offset)
        self._attend_to(
            successor.process, successor.generation, successor.launch, successor.log_offset
        )
        return before

    def skip(self, generation: int) -> None:
        """Begin with a later one: somebody has the number who is not kept."""
        if generation > self.service.generation:
            self.service = replace(self.service, generation=generation)

    def take(self, unit: Unit) -> None:
        """Start the next process as another `unit` of the same service says."""
        self.unit = unit
        self._inquest.take(unit)

    def try_again(self) -> None:
        """Do not wait any longer before the next try."""
        if self.service.state is State.FAILED and self.service.timer_at is not None:
            self.post(events.TimerElapsed(self.service.timer_at))

    async def is_loading(self) -> bool:
        """Whether a llama-server that counts as ready, since it listens, still loads its model."""
        age_s = self._loop.time() - self.service.started_at
        if not self.unit.readiness.tcp or age_s >= self.unit.policy.start_timeout_s:
            return False
        health = Target(Via.HTTP, port=self.port or 0, path=llama_server.HEALTH)
        result = await probe(health, self.unit.readiness.timeout_s)
        return result.outcome is Outcome.LOADING

    def disown(self) -> Running | None:
        """Let go of the process, which lives on: another keeper takes it, of this or a next daemon.

        Returns it, if there is one.
        """
        self._dismiss()
        if self._timer is not None:
            self._timer.cancel()
        if self._process is None:
            return None
        self._process.disown()
        self._process = None
        return self._running

    async def wait_swept(self) -> None:
        """Until no descendant that left its process group is being looked for any more."""
        while self._sweeps:
            await asyncio.wait(self._sweeps)

    def _step(self, event: Event) -> None:
        before, now = self.service, self._loop.time()
        self.service, actions = lifecycle.step(before, event, now)
        findings = self._inquest.follow(before, self.service, now)
        self._set_timer()
        try:
            if self.service != before:
                self._on_change(before, self.service)
        finally:
            for action in actions:
                self._perform(action)
            if findings is not None:
                self._on_death(findings)

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
                elif self._held_back is None:
                    self.post(events.SpawnFailed(generation, "stopped before it was spawned"))
            case events.Kill(generation):
                if self._process is not None:
                    self._process.kill()
                elif self._held_back is None:
                    self.post(events.Exited(generation, "is gone"))

    # --- spawning

    def _spawn(self, generation: int) -> None:
        self._dismiss()
        self._inquest.note_launch(None)
        if self.unit.uses_card:
            self._attend(self._launch_when_placed(generation))
        else:
            self._launch(generation, UNPLANNED)

    async def _launch_when_placed(self, generation: int) -> None:
        """Its turn on the card may take a while to come; it is a wait, and no start that stalls."""
        answer = self._card.ask(self.unit.name, generation)
        look_s = TURN_FIRST_LOOK_S
        while not answer.done():
            await asyncio.wait([answer], timeout=look_s)
            if not answer.done():
                self.post(events.Postponed(generation, self._card.why(self.unit.name)))
            look_s = min(TURN_LOOK_PERIOD_S, self.unit.policy.stall_timeout_s / 4)
        try:
            grant = answer.result()
        except Exception as error:
            self._fail_spawn(generation, error)
            return
        self.post(events.Postponed(generation, ""))
        self._launch(generation, grant)

    def _launch(self, generation: int, grant: Grant) -> None:
        if self.unit.prepare is not None and not self.unit.is_prepared():
            self._attend(self._launch_when_prepared(generation, grant, self.unit.prepare))
        else:
            self._launch_prepared(generation, grant)

    async def _launch_when_prepared(
        self, generation: int, grant: Grant, prepare: Callable[[], None]
    ) -> None:
        """The program was replaced since it was looked at."""
        with suppress(LaunchError):  # the launch says it, too
            await asyncio.to_thread(prepare)
        self._launch_prepared(generation, grant)

    def _launch_prepared(self, generation: int, grant: Grant) -> None:
        try:
            launch = self.unit.launch(grant)
            self._inquest.note_launch(launch)
            for model in launch.models:
                gguf.require_loadable(model)
            if _holder(launch.ports) is None:
                self._spawn_now(generation, launch)
            else:
                self._attend(self._spawn_when_free(generation, launch))
        except Exception as error:
            self._fail_spawn(generation, error)

    def _spawn_now(self, generation: int, launch: Launch) -> None:
        with self._troubles.watched(
            f"the output of {self.unit.name} is not kept, until it is restarted"
        ):
            logfile.append(self.unit.log, f"--- {self.unit.name}, generation {generation}")
        offset = logfile.size_bytes(self.unit.log)
        mark = self.unit.generation_mark(generation)
        process = Process.spawn(launch, log=self.unit.log, mark=mark)
        self._inquest.note_process(process.pid, offset)
        self.port, self.model, self.log_start = self.unit.port, self.unit.model, offset
        self.launch = launch
        self.post(events.Spawned(generation, process.pid))
        warm_up = partial(self._put_back, launch) if launch.slots is not None else None
        self._attend_to(process, generation, launch, offset, warm_up)

    async def _put_back(self, launch: Launch) -> None:
        await self._warmth.put_back(self.service, launch)

    def _attend_to(
        self,
        process: Process,
        generation: int,
        launch: Launch,
        log_offset: int,
        warm_up: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        def on_exit(status: ExitStatus) -> None:
            self._note_exit(generation, launch, status, log_offset)

        self._process = process
        self._running = Running(process, generation, launch, log_offset)
        process.watch(on_exit)
        attendance = Attendance(
            self.unit,
            generation,
            launch,
            process,
            post=self.post,
            service=lambda: self.service,
            warm_up=warm_up,
        )
        self._attend(attendance.attend_readiness())
        self._attend(attendance.attend_progress())
        self._attend(self._inquest.keep_looking())
        self._attend(attendance.attend_liveness())

    async def _spawn_when_free(self, generation: int, launch: Launch) -> None:
        """A port is held: by what is left of the last generation, or by a stranger."""
        await self.wait_swept()
        patience_s = min(PORT_RELEASE_TIMEOUT_S, self.unit.policy.stall_timeout_s / 2)
        deadline = self._loop.time() + patience_s
        while (holder := _holder(launch.ports)) is not None:
            if holder.pid is not None and self._is_leaving(holder.pid):
                self.post(events.Progressed(generation))
                self.post(events.ProbeFailed(generation, f"{_held(holder)}, which is being ended"))
                deadline = self._loop.time() + patience_s
                await asyncio.sleep(LEAVING_LOOK_PERIOD_S)
            elif self._loop.time() < deadline:
                await asyncio.sleep(PORT_LOOK_PERIOD_S)
            else:
                break
        if holder is not None:
            self.post(events.SpawnFailed(generation, _held(holder), cause=Cause.PORT_IN_USE))
            return
        try:
            self._spawn_now(generation, launch)
        except Exception as error:
            self._fail_spawn(generation, error)

    def _fail_spawn(self, generation: int, error: Exception) -> None:
        if not isinstance(error, LaunchError):
            log.error("service=%s its launch broke", self.unit.name, exc_info=error)
            is_permanent = not isinstance(error, OSError)  # those pass, a bug does not
            error = LaunchError(f"{type(error).__name__}: {error}", permanent=is_permanent)
        reason = f"{error.message} ({error.hint})" if error.hint else error.message
        cause = MODEL_CAUSES[error.flaw] if error.flaw else Cause.LAUNCH
        cause = Cause.NO_ROOM if isinstance(error, NoRoomError) else cause
        self.post(events.SpawnFailed(generation, reason, error.permanent, error.shortage, cause))

    # --- the end of a process

    def _note_exit(
        self, generation: int, launch: Launch, status: ExitStatus, log_offset: int
    ) -> None:
        self._dismiss()
        self._process = None
        diagnosis = self._diagnosed(launch, status, log_offset)
        # What fails a start for good cannot be the end of a server that was ready, and the words
        # are those of llama-server: another program may say them and mean something else.
        is_permanent = (
            diagnosis.is_permanent
            and self.unit.kind == "llama-server"
            and self.service.state is State.STARTING
        )
        reason, is_remedied = diagnosis.reason, False
        if diagnosis.cause is Cause.GPU_MEMORY and self.unit.uses_card:
            lines = self._loading_lines(log_offset)
            words, is_remedied = self._card.note_out_of_memory(self.unit.name, lines)
            reason = f"{reason}; {words}" if words else reason
        cause = diagnosis.cause
        is_starting = self.service.state is State.STARTING
        if is_starting and not is_remedied and self._warmth.was_fed(self.service):
            self._warmth.distrust(self.service)
            cause, is_permanent, is_remedied = Cause.PROMPT_CACHE, False, True
            reason = f"{reason}; it had got back what was kept of its prompt cache"
        exited = events.Exited(
            generation,
            reason,
            clean=status.clean,
            permanent=is_permanent,
            remedied=is_remedied,
            cause=cause,
        )
        # A death is answered at once; a stop is over when nothing is left of the generation.
        if self.service.state is State.STOPPING:
            self._held_back = exited
        else:
            self.post(exited)
        self._sweep(generation)

    def _diagnosed(self, launch: Launch, status: ExitStatus, log_offset: int) -> Diagnosis:
        oom_kills = self._inquest.note_exit(status)
        # Somebody who is killed says nothing about it; not reading the log makes for a quick spawn.
        is_killed = status.signal in KILLING
        ending = Ending(
            status.reason,
            status.code,
            status.signal,
            () if is_killed else self._last_lines(log_offset),
            oom_kills,
            was_ready=self.service.state is not State.STARTING,
        )
        diagnosis = diagnose(ending)
        if diagnosis.cause in {Cause.PORT_IN_USE, Cause.CANNOT_LISTEN}:
            holder = _holder((*diagnosis.ports, *launch.ports))
            return with_holder(ending, _held(holder)) if holder else diagnosis
        return diagnosis

    def _loading_lines(self, log_offset: int) -> list[str]:
        """All that it said while it loaded, and what it said last."""
        end = logfile.size_bytes(self.unit.log)
        return logfile.lines_between(self.unit.log, log_offset, end, LOADING_LINES, LOADING_BYTES)

    def _last_lines(self, log_offset: int) -> list[str]:
        end = logfile.size_bytes(self.unit.log)
        return logfile.lines_between(self.unit.log, log_offset, end, LAST_LINES, LAST_BYTES)

    def _sweep(self, generation: int) -> None:
        """End descendants of the generation that left its process group; they carry its mark."""

        async def end_strays() -> None:
            try:
                ended = await asyncio.to_thread(
                    end_marked, self.unit.generation_mark(generation), STRAY_GRACE_S
                )
                if ended:
                    log.warning("service=%s ended %d stray processes", self.unit.name, ended)
            except OSError as error:
                log.warning("service=%s strays were not looked for: %s", self.unit.name, error)
            except Exception:
                log.exception("service=%s strays could not be looked for", self.unit.name)

        def done(sweep: asyncio.Task[None]) -> None:
            self._sweeps.discard(sweep)
            exited, self._held_back = self._held_back, None
            if exited is not None:
                self.post(exited)

        sweep = self._loop.create_task(end_strays())
        self._sweeps.add(sweep)
        sweep.add_done_callback(done)

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


def _restored(unit: Unit, remembered: Remembered | None) -> Service:
    """The service as an earlier daemon left it, without its process."""
    fresh = Service(unit.name, unit.policy)
    if remembered is None:
        return fresh
    return replace(
        fresh,
        generation=remembered.generation,
        restarts=remembered.restarts,
        deaths=remembered.deaths[-unit.policy.restart.max_deaths :],
    )


def _holder(candidates: Iterable[int]) -> ports.PortOwner | None:
    """Who listens on one of the ports."""
    return next((owner for port in candidates for owner in ports.owners(port)), None)


def _held(owner: ports.PortOwner) -> str:
    return f"port {owner.port} is held by {ports.describe(owner)}"
