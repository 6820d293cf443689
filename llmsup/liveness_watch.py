"""Looks whether one process shows signs of life, from the cheapest sign to the dearest.

First what the kernel knows. Only where that shows nothing is the service asked: a server that is
busy is left alone, and asking llama-server too often keeps it from noticing clients that left.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from llmsup.config.schema import Liveness
from llmsup.core.health import Outcome
from llmsup.core.liveness import Pulse, Vitals, Voice, Work, is_still, observe, period_s
from llmsup.host import ports, procfs
from llmsup.host.fetch import fetch
from llmsup.host.probe import probe
from llmsup.host.signs import signs
from llmsup.services import llama_work
from llmsup.services.launch import Launch, Target, Via

ANSWER_TIMEOUT_S = 1.5

Said = tuple[Voice, Work | None]

_REFUSED: Said = (Voice.UNKNOWN, None)
_VOICES = {
    Outcome.PASSED: Voice.ANSWERED,
    Outcome.LOADING: Voice.ANSWERED,
    Outcome.UNWELL: Voice.ANSWERED,
    Outcome.SILENT: Voice.SILENT,
    Outcome.FAILED: Voice.UNKNOWN,  # refused, say: not a hang
    Outcome.UNKNOWN: Voice.UNKNOWN,
}


class LivenessWatch:
    """The pulse of the process `pid`, which was started as `launch`."""

    def __init__(
        self,
        policy: Liveness,
        pid: int,
        launch: Launch,
        is_gpu_busy: Callable[[], bool | None],
    ) -> None:
        self._policy = policy
        self._pid = pid
        self._target = launch.target
        self._tells_work = launch.tells_work
        self._may_wait = launch.may_wait
        self._is_gpu_busy = is_gpu_busy
        self._answer_timeout_s = min(ANSWER_TIMEOUT_S, period_s(policy))
        self._clock = asyncio.get_running_loop().time
        self._pulse: Pulse | None = None

    async def look(self) -> str:
        """Look once. Returns why the process counts as hung; empty where it does not."""
        now = self._clock()
        seen = signs(self._pid)
        vitals = Vitals(
            cpu_s=seen.cpu_s,
            faults=seen.faults,
            is_stopped=seen.is_stopped,
            is_traced=seen.is_traced,
            is_gpu_busy=self._is_gpu_busy(),
        )
        if not vitals.is_stopped and is_still(self._pulse, vitals, now, self._policy):
            vitals = await self._ask(vitals)
        self._pulse = observe(self._pulse, vitals, now, self._policy)
        return self._pulse.reason

    async def _ask(self, vitals: Vitals) -> Vitals:
        """What the service says, added to what was seen.

        One that tells of its work is asked for its health only once it is suspect.
        """
        if self._pulse is not None and self._pulse.is_suspect:
            outcome, said = await asyncio.gather(self._ask_for_health(), self._ask_for_work())
        else:
            said = await self._ask_for_work()
            outcome = Outcome.UNKNOWN if said else await self._ask_for_health()
        voice, work = said or (_VOICES[outcome], None)
        return replace(
            vitals,
            voice=voice,
            work=work,
            is_healthy=outcome is Outcome.PASSED,
            is_waiting=voice is Voice.SILENT and self._may_wait and self._has_asked(),
        )

    def _has_asked(self) -> bool:
        return ports.have_asked(procfs.descendants(self._pid))

    async def _ask_for_health(self) -> Outcome:
        if self._target.via is not Via.HTTP:
            return Outcome.UNKNOWN  # the kernel accepts connections for one that hangs, too
        return (await probe(self._target, self._answer_timeout_s)).outcome

    async def _ask_for_work(self) -> Said | None:
        """What a llama-server says of its requests; None where there are no such endpoints."""
        if not self._tells_work:
            return None
        try:
            metrics = await self._work(llama_work.METRICS_PATH, llama_work.parse_metrics)
            if metrics is not None and metrics.pending == 0:
                return Voice.ANSWERED, metrics
            slots = await self._work(llama_work.SLOTS_PATH, llama_work.parse_slots)
        except TimeoutError:
            return Voice.SILENT, None
        except (OSError, ValueError):
            return _REFUSED
        works = [work for work in (metrics, slots) if work is not None]
        return (Voice.ANSWERED, llama_work.merged(works)) if works else None

    async def _work(self, path: str, parse: Callable[[bytes], Work]) -> Work | None:
        target = Target(Via.HTTP, host=self._target.host, port=self._target.port, path=path)
        response = await fetch(target, timeout_s=self._answer_timeout_s)
        return parse(response.body) if response.status == 200 else None
