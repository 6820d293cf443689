"""Switches to another profile: a daemon with that one takes over, on trial, and may go back.

Up to three daemons have a part in one switch, each in the place of the one before. The first looks
whether anything speaks against it, writes down what is tried, and hands over. The second brings the
profile about: it chooses it in the end, or hands back. The third has the old profile serve again.
A daemon that finds a trial which was not handed over to it is the third: the second was killed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path

from msgspec import structs

from llmsup.adoption import Takeover
from llmsup.choosing import Chosen
from llmsup.config.load import Loaded
from llmsup.config.models import size_bytes
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.core import trial
from llmsup.core.service import State, Want
from llmsup.core.trial import Failed, Pending, Phase, Story, Verdict, message
from llmsup.errors import LlmsupError
from llmsup.host import procfs
from llmsup.host.choices import Trial
from llmsup.host.journal import Journal
from llmsup.host.model_server import served_model
from llmsup.proving import Proving
from llmsup.rolls import Rolls
from llmsup.strays import Strays
from llmsup.supervisor import Supervisor

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 0.05
TELL_PERIOD_S = 0.5
QUIET_TIMEOUT_S = 15.0
UNFINISHED = "the daemon ended before that was over"


class Part(Enum):
    """That of this daemon in a switch that an earlier one began."""

    NONE = "none"
    TRYING = "trying"
    RETURNING = "returning"


class ProfileSwitching:
    """The switches of one daemon: the one that it ends, and the ones that it begins.

    `is_heir`: whether an earlier daemon has handed over to this one. `require_startable` loads the
    profile of a file and raises LlmsupError with everything that is wrong with it;
    `require_feasible` raises it for what cannot come up here. `asked` is what the operator asked of
    services. `hand_over` leaves everything to a new daemon with the profile of that file.
    """

    def __init__(
        self,
        loaded: Loaded,
        chosen: Chosen,
        supervisor: Supervisor,
        journal: Journal,
        *,
        is_heir: bool,
        rolls: Rolls,
        strays: Strays,
        require_startable: Callable[[str], Awaitable[Loaded]],
        require_feasible: Callable[[Loaded], Awaitable[None]],
        asked: Callable[[], dict[str, str]],
        hand_over: Callable[[str], object],
        withheld: dict[str, range],
        publish: Callable[[], None],
    ) -> None:
        self._loaded = loaded
        self._chosen = chosen
        self._supervisor = supervisor
        self._journal = journal
        self._rolls = rolls
        self._strays = strays
        self._require_startable = require_startable
        self._require_feasible = require_feasible
        self._asked = asked
        self._hand_over = hand_over
        self._woken = asyncio.Event()
        self._proving = Proving(
            loaded.profile,
            supervisor,
            chosen,
            withheld=withheld,
            publish=publish,
            tell=self._woken.set,
        )
        self._up: frozenset[str] = frozenset()
        self._last: dict[str, int] = {}  # generations of the other profile
        self._result: SwitchResult | None = None
        self._is_handed_over = False
        self._story: Story | None = None
        self._phase, self._began_at = Phase.CHECKING, 0.0
        found = chosen.trial
        self._part = _part(found, str(loaded.path), is_heir=is_heir)
        if found is not None and self._part is not Part.NONE:
            reason = found.reason or UNFINISHED
            self._story = Story(Path(found.old).stem, Path(found.new).stem, reason)
            self._phase = Phase.LOADING if self._part is Part.TRYING else Phase.RESTORING
            self._began_at = found.began_at

    @property
    def is_on(self) -> bool:
        """Whether one goes on."""
        return self._story is not None and self._result is None

    def require_idle(self) -> None:
        """Raise LlmsupError while one goes on."""
        if self._story is not None and self.is_on:
            raise LlmsupError(
                f"{self._story.old} is being switched to {self._story.new}",
                hint="try again once that has ended; llmsup events shows it",
            )

    @property
    def expected(self) -> frozenset[str]:
        """The services that it is about to bring up, or that the next daemon is."""
        return self._up if self.is_on else frozenset()

    def note_change(self) -> None:
        """A service is another one now."""
        self._woken.set()

    # --- the first daemon

    def begin(self, new: Loaded) -> None:
        """A switch, to be `run`. Raises LlmsupError while one goes on."""
        self.require_idle()
        self._story = Story(self._loaded.name, new.name)
        self._phase, self._began_at = Phase.CHECKING, time.monotonic()
        self._result = None

    async def run(self, target: str, new: Loaded) -> None:
        """Look at the profile that is called `target`, and hand over to it."""
        try:
            if new.path == self._loaded.path:
                self._choose(target)
                await self._end(Phase.SWITCHED, was_serving=True)
                return
            await self._require_feasible(new)
            self._try_out(target, new)
        except LlmsupError as error:
            await self._end(Phase.REFUSED, reason=error.message)
        except asyncio.CancelledError:
            self._break_off("the stack stops")
            raise
        except Exception as error:
            log.exception("the switch to %s broke", new.name)
            await self._end(Phase.REFUSED, reason=f"{type(error).__name__}: {error}")

    def _try_out(self, target: str, new: Loaded) -> None:
        unready = [
            name
            for name, service in self._supervisor.services.items()
            if service.want is Want.UP and service.state is not State.READY
        ]
        tried = Trial(
            old=str(self._loaded.path),
            new=str(new.path),
            target=target,
            began_at=self._began_at,
            boot_id=procfs.boot_id(),
            asked=self._asked(),
            unready=tuple(unready),
        )
        try:
            # From here on a daemon that is killed over it is followed by one that goes back.
            self._chosen.try_out(tried)
        except OSError as error:
            raise LlmsupError(f"nothing can be remembered of it: {error}") from None
        self._give_way(tried.new)

    def _give_way(self, profile: str) -> None:
        self._hand_over(profile)
        self._is_handed_over = True

    # --- those after it

    @property
    def asked_before(self) -> Mapping[str, str]:
        """What the operator had asked of services before the switch, where it is taken back."""
        found = self._chosen.trial
        if found is None or self._part is not Part.RETURNING or found.boot_id != procfs.boot_id():
            return {}
        return found.asked

    def take_over(self, taken: Takeover, up: Sequence[str]) -> None:
        """`up` are to come up, and these of them were adopted. To be called before any is started.

        Models that differ leave together, and get no requests from the first moment on: none is
        answered by a model of the other profile, and each is planned with the room of all.
        """
        if self._part is Part.NONE:
            return
        keepers, current = self._supervisor.keepers, taken.adopted - taken.outdated
        self._up = frozenset(up)
        self._last = {name: keepers[name].service.generation for name in self._up - current}
        models = {
            name: last for name, last in self._last.items() if keepers[name].unit.model is not None
        }
        self._rolls.leave_together(taken.outdated.intersection(models))
        self._proving.begin(models, are_known=self._part is Part.RETURNING)

    async def watch(self) -> None:
        """Bring it to an end. Cancelled, it leaves everything as it is."""
        is_trying = self._part is Part.TRYING
        try:
            verdict = await self._judged()
            if isinstance(verdict, Failed):
                await (self._go_back if is_trying else self._lose)(verdict.reason)
            else:
                await self._end(Phase.SWITCHED if is_trying else Phase.RESTORED)
        except asyncio.CancelledError:
            self._break_off("the stack stops")
            raise
        except Exception as error:
            log.exception("the switch broke")
            await self._lose(f"{type(error).__name__}: {error}")

    async def _judged(self) -> Verdict:
        while isinstance(verdict := self._judge(), Pending):
            self._woken.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_PERIOD_S):
                    await self._woken.wait()
        return verdict

    def _judge(self) -> Verdict:
        found = self._chosen.trial
        passed_over = frozenset(found.unready if found else ())
        if self._part is Part.TRYING:
            self._proving.look()
            self._phase = Phase.VERIFYING if self._proving.loading is None else Phase.LOADING
            faults = self._proving.faults
            passed_over -= faults.keys()
        else:
            faults = dict.fromkeys(self._proving.faults, "")
        services = self._supervisor.services
        return trial.judge(
            [services[name] for name in self._up - passed_over],
            self._last,
            faults,
            is_rolling=bool(self._rolls.pending or self._rolls.leaving),
        )

    async def _go_back(self, reason: str) -> None:
        """Hand over to a daemon with the old profile, as long as that can be started."""
        found = self._chosen.trial
        if found is None:
            return
        self._phase = Phase.RESTORING
        log.error("going back to %s: %s", found.old, reason)
        try:
            await self._require_startable(found.old)
        except LlmsupError as error:
            why_lost = "; ".join(error.message.splitlines())
            await self._end(Phase.STUCK, reason=reason, why_lost=why_lost)
            return
        try:
            self._chosen.try_out(structs.replace(found, reason=reason))
        except OSError as error:
            log.error("the reason is not remembered: %s", error)
        await self._wait_quiet()
        self._give_way(found.old)

    async def _wait_quiet(self) -> None:
        """Until nothing is being ended: the next daemon would adopt it."""
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        while time.monotonic() < deadline:
            states = {each.state for each in self._supervisor.services.values()}
            if State.STOPPING not in states and not self._strays.are_ending:
                return
            await asyncio.sleep(LOOK_PERIOD_S)

    async def _lose(self, reason: str) -> None:
        """What ran before does not come back at once, or cannot be handed back to."""
        if self._part is Part.TRYING:
            await self._end(Phase.STUCK, reason=reason, why_lost="see the log of the daemon")
        else:
            await self._end(Phase.LOST, why_lost=reason)

    # --- what is told

    def follow(self) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """How far it is, again and again, and what came of it at last.

        Without a result it ends where another daemon goes on with it. Raises LlmsupError where
        there is none.
        """
        if self._story is None:
            raise LlmsupError("nothing is being switched", hint="llmsup events shows what was")
        return self._followed(self._story)

    async def _followed(self, story: Story) -> AsyncIterator[SwitchProgress | SwitchResult]:
        yield self._progress(story)  # at least once: the client is to know that there is more
        told, told_at = self._phase, time.monotonic()
        while self._result is None and not self._is_handed_over:
            if told is not self._phase or time.monotonic() >= told_at + TELL_PERIOD_S:
                told, told_at = self._phase, time.monotonic()
                yield self._progress(story)
            await asyncio.sleep(LOOK_PERIOD_S)
        if self._result is not None:
            yield self._result

    def _progress(self, story: Story) -> SwitchProgress:
        progress: SwitchProgress = {
            "phase": self._phase.value,
            "profile": story.new,
            "service": "",
            "model": "",
            "elapsed_s": round(time.monotonic() - self._began_at, 3),
            "read_bytes": 0,
            "size_bytes": 0,
            "last_load_s": None,
            "why": "",
        }
        name = self._proving.loading
        if name is None:
            return progress
        service, model = self._supervisor.services[name], self._proving.model(name)
        whole_bytes = size_bytes(model)
        taken_bytes = procfs.bytes_taken_in(service.pid) if service.pid is not None else 0
        return {
            **progress,
            "service": name,
            "model": model.name,
            "read_bytes": min(taken_bytes, whole_bytes),
            "size_bytes": whole_bytes,
            "last_load_s": self._chosen.last_load_s(model),
            "why": service.why,
        }

    # --- the end

    async def _end(
        self, phase: Phase, *, reason: str = "", why_lost: str = "", was_serving: bool = False
    ) -> None:
        if self._story is None:
            return
        story = replace(
            self._story,
            reason=reason or self._story.reason,
            why_lost=why_lost,
            was_serving=was_serving,
        )
        found, self._phase = self._chosen.trial, phase
        if found is not None:
            self._choose(found.target if phase is Phase.SWITCHED else None)
        self._proving.end()
        self._finish(message(phase, story), await self._current_model())

    def _choose(self, profile: str | None) -> None:
        """From now on the profile that is meant is this one; None: the one before."""
        try:
            self._chosen.end_trial(profile)
        except OSError as error:
            log.error("what came of the switch is not remembered: %s", error)

    def _break_off(self, why: str) -> None:
        if self._story is not None:
            self._finish(f"the switch to {self._story.new} broke off: {why}", None)

    def _finish(self, words: str, model: str | None) -> None:
        log.info("switch: %s", words)
        self._journal.write("switch", why=words)
        self._result = {
            "success": self._phase is Phase.SWITCHED,
            "message": words,
            "current_model": model,
            "service": None,
            "profile": self._loaded.name,
            "switch_time_s": round(time.monotonic() - self._began_at, 3),
            "warm_tokens": 0,
        }

    async def _current_model(self) -> str | None:
        """The model that answers the first route of which one is ready."""
        for route in self._loaded.profile.route.values():
            for name in route.services:
                keeper = self._supervisor.keepers[name]
                is_ready = keeper.service.state is State.READY
                if is_ready and keeper.port is not None and keeper.unit.model is not None:
                    return Path(await served_model(keeper.port)).name or keeper.model
        return None


def _part(found: Trial | None, profile: str, *, is_heir: bool) -> Part:
    if found is None:
        return Part.NONE
    if is_heir and profile == found.new:
        return Part.TRYING
    return Part.RETURNING if profile == found.old else Part.NONE
