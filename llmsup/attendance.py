"""Attends one process from its spawn to its end: is it ready, and does it make progress?

What is seen is told as events; nothing is decided here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from llmsup.config.schema import Liveness, Readiness
from llmsup.core import events, health, liveness
from llmsup.core.events import Event
from llmsup.core.grant import UNPLANNED, Grant
from llmsup.core.health import Health, Outcome, ProbeResult
from llmsup.core.leases import Rank
from llmsup.core.service import Policy, Service, State
from llmsup.host import ports
from llmsup.host.fetch import fetch
from llmsup.host.probe import probe
from llmsup.host.process import Process, carries_mark
from llmsup.liveness_watch import LivenessWatch
from llmsup.services.launch import Launch, Prompt, Via

log = logging.getLogger(__name__)

FIRST_PROBE_S = 0.01
PROBE_GROWTH = 1.05
"""So a start is seen to be over within a twentieth of the time that it took."""
STARTING_PERIOD_MAX_S = 0.25
PROGRESS_PERIOD_S = 1.0
SETTLE_MAX_S = 1.0
EXPECTED_SILENCE_S = 0.5
FIRST_PROMPT_S = 60.0
WATCHED = frozenset({State.READY, State.UNREADY, State.DRAINING})
"""The states in which a service that hangs is replaced; a start has its own time limits."""


class MakeLaunch(Protocol):
    """Makes up the launch of a service, with what it got of the card if it uses one."""

    def __call__(self, grant: Grant = UNPLANNED, /) -> Launch:
        """May raise LaunchError."""
        ...


@dataclass(frozen=True)
class Unit:
    """What has to be known of a service to keep it.

    `gpu_layers`: what the profile says; `rank`: whose turn on the card comes first.
    `is_gpu_busy`: whether the card that it may use computes; None where that is not known.
    """

    name: str
    kind: str
    launch: MakeLaunch
    log: Path
    mark: str
    policy: Policy = field(default_factory=Policy)
    readiness: Readiness = field(default_factory=Readiness)
    liveness: Liveness = field(default_factory=Liveness)
    is_gpu_busy: Callable[[], bool | None] = lambda: None
    depends_on: tuple[str, ...] = ()
    port: int | None = None
    model: str | None = None
    gpu_layers: int | str | None = None
    rank: Rank = (True, 0, "")
    successor: Callable[[Launch, int], Launch] | None = None
    """How a process is started that takes over from a live one, as the number after its own."""
    prepare: Callable[[], None] | None = None
    """Finds out what `launch` only looks up. It may take a second: call it in a thread."""
    is_prepared: Callable[[], bool] = lambda: True
    """Whether the program is the one that `prepare` was last called for."""

    @property
    def uses_card(self) -> bool:
        """Whether it may have layers on the card; a plan may leave it none."""
        return self.gpu_layers not in {None, 0}

    def generation_mark(self, generation: int) -> str:
        """The mark of one generation; closed, so that 1 is no prefix of 10."""
        return f"{self.mark}{generation}:"


class Attendance:
    """One generation of a service, its launch and its process.

    `warm_up` is done once, before it counts as ready; it raises nothing.
    """

    def __init__(
        self,
        unit: Unit,
        generation: int,
        launch: Launch,
        process: Process,
        *,
        post: Callable[[Event], None],
        service: Callable[[], Service],
        warm_up: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._unit = unit
        self._generation = generation
        self._launch = launch
        self._process = process
        self._post = post
        self._service = service
        self._warm_up = warm_up
        self._clock = asyncio.get_running_loop().time
        self._last = ProbeResult(Outcome.UNKNOWN)
        self._is_prepared = False

    async def attend_readiness(self) -> None:
        """Probe until cancelled; post what the thresholds make of it."""
        readiness = self._unit.readiness
        # A successor is known to be ready: what follows is told from there.
        so_far = Health(is_ready=self._service().state is State.READY)
        pause_s = FIRST_PROBE_S
        if self._launch.target.via is Via.ALIVE:
            stall_timeout_s = self._unit.policy.stall_timeout_s
            await asyncio.sleep(min(readiness.period_s, SETTLE_MAX_S, stall_timeout_s / 2))
        while True:
            self._last = await self._probe(so_far)
            after = health.observe(so_far, self._last, readiness)
            if after.is_ready and not so_far.is_ready and await self._prepare():
                continue  # it may have died of that
            self._tell(so_far, after)
            so_far = after
            if self._service().state is State.STARTING:
                pause_s = min(pause_s * PROBE_GROWTH, STARTING_PERIOD_MAX_S, readiness.period_s)
            else:
                pause_s = health.until_next_s(self._clock(), readiness.period_s)
            await asyncio.sleep(pause_s)

    async def attend_progress(self) -> None:
        """Until it is ready: post Progressed whenever it was seen to do something.

        A server that answers, and not that it is loading, makes no progress however much it logs:
        it may be writing a line for each of our own probes.
        """
        look_every_s = min(PROGRESS_PERIOD_S, self._unit.policy.stall_timeout_s / 4)
        before = self._process.progress()
        while self._service().state is State.STARTING:
            await asyncio.sleep(look_every_s)
            now = self._process.progress()
            if now != before and self._last.outcome is not Outcome.UNWELL:
                self._post(events.Progressed(self._generation))
            before = now

    async def attend_liveness(self) -> None:
        """While it is up: look for signs of life, and post Hung once there are none any more."""
        policy = self._unit.liveness
        if policy.timeout_s == 0:
            return
        watch = LivenessWatch(policy, self._process.pid, self._launch, self._unit.is_gpu_busy)
        period_s = liveness.period_s(policy)
        reason, look_at = "", self._clock() + period_s
        while not reason:
            await asyncio.sleep(look_at - self._clock())
            look_at = self._clock() + period_s
            if self._service().state not in WATCHED:
                continue
            try:
                reason = await watch.look()
            except Exception:
                log.exception("service=%s could not be watched", self._unit.name)
        self._post(events.Hung(self._generation, reason))

    async def _prepare(self) -> bool:
        """What is done once, before anybody else may ask. Returns whether anything was."""
        prompt = self._launch.first_prompt
        if self._is_prepared or (prompt is None and self._warm_up is None):
            return False
        self._is_prepared = True
        if prompt is not None:
            await self._ask_first(prompt)
        if self._warm_up is not None:
            await self._warm_up()
        return True

    async def _ask_first(self, prompt: Prompt) -> None:
        """Whatever is answered will do; a death is seen elsewhere."""
        target = replace(self._launch.target, via=Via.HTTP, path=prompt.path)
        with suppress(OSError, ValueError):  # TimeoutError is an OSError
            await fetch(target, timeout_s=FIRST_PROMPT_S, method="POST", body=prompt.body)

    async def _probe(self, so_far: Health) -> ProbeResult:
        try:
            result = await probe(self._launch.target, self._unit.readiness.timeout_s)
            if result.outcome is Outcome.PASSED and not so_far.is_ready:
                result = self._stranger_beside() or result
        except Exception as error:
            # A probe that cannot be made says nothing about the service, but must not end quietly.
            log.exception("service=%s its probe broke", self._unit.name)
            result = ProbeResult(Outcome.FAILED, f"the probe broke: {error}")
        if result.outcome is Outcome.UNKNOWN and result.reason != self._last.reason:
            log.warning("service=%s could not be probed: %s", self._unit.name, result.reason)
        return result

    def _tell(self, before: Health, after: Health) -> None:
        generation, service, reason = self._generation, self._service(), self._last.reason
        if after.is_ready and not before.is_ready:
            self._post(events.BecameReady(generation))
        elif before.is_ready and not after.is_ready:
            why = f"{after.failures} probes failed: {reason}"
            self._post(events.BecameUnready(generation, why))
        elif service.state is State.UNREADY and reason and not service.why.endswith(reason):
            self._post(events.BecameUnready(generation, f"its probes fail: {reason}"))
        elif self._is_worth_telling(service):
            self._post(events.ProbeFailed(generation, reason))

    def _is_worth_telling(self, service: Service) -> bool:
        """Whether the last probe is news about a start that takes longer than most."""
        age_s = self._clock() - service.started_at
        is_news = self._last.reason not in {"", service.probed}
        return service.state is State.STARTING and is_news and age_s > EXPECTED_SILENCE_S

    def _stranger_beside(self) -> ProbeResult | None:
        """A failure where a stranger listens on the port, too: SO_REUSEPORT would let them.

        Only processes of our own user can share a port so, and those can be seen; a listener that
        cannot (the proxy of a container, say) is what the service itself has set up.
        """
        mark = self._unit.generation_mark(self._generation)
        for port in self._launch.ports:
            for owner in ports.strangers(port, self._process.pid):
                if owner.pid is not None and not carries_mark(owner.pid, mark):
                    reason = f"port {port} is also held by {ports.describe(owner)}"
                    return ProbeResult(Outcome.FAILED, reason)
        return None
