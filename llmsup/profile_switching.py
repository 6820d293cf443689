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
from enum import Enum
from pathlib import Path

from msgspec.structs import replace

from llmsup.adoption import Takeover
from llmsup.choosing import Chosen
from llmsup.config.load import Loaded
from llmsup.config.models import size_bytes
from llmsup.config.schema import LlamaServer
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.core import trial
from llmsup.core.service import State
from llmsup.core.trial import Failed, Passed, Pending, Phase, Story, Verdict, message
from llmsup.errors import LlmsupError
from llmsup.host import procfs
from llmsup.host.choices import Trial
from llmsup.host.journal import Journal
from llmsup.host.model_server import served_model, token_fault
from llmsup.rolls import Rolls
from llmsup.strays import Strays
from llmsup.supervisor import Supervisor

log = logging.getLogger(__name__)

FOREVER = 2**63
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
    """The switches of one daemon: the one that it ends, and the one that it begins.

    `is_heir`: whether an earlier daemon has handed over to this one. `require_startable` loads the
    profile of a file and raises LlmsupError with everything that is wrong with it;
    `require_feasible` raises it for what cannot come up here. `hand_over` leaves everything to a
    new daemon with the profile of that file. `withheld` are the generations that get no requests;
    `publish` has the lists follow it.
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
        self._rolls = rolls
        self._strays = strays
        self._journal = journal
        self._require_startable = require_startable
        self._require_feasible = require_feasible
        self._asked = asked
        self._hand_over = hand_over
        self._withheld = withheld
        self._publish = publish
        self._woken = asyncio.Event()
        self._trial = chosen.trial
        self._part = _part(self._trial, str(loaded.path), is_heir=is_heir)
        self._story: Story | None = None
        self._phase = Phase.CHECKING
        self._began_at = 0.0
        self._result: SwitchResult | None = None
        self._is_handed_over = False
        self._up: frozenset[str] = frozenset()
        self._last: dict[str, int] = {}  # generations of the other profile
        self._proofs: dict[str, asyncio.Task[str] | None] = {}
        if self._trial is not None and self._part is not Part.NONE:
            self._resume(self._trial)

    def _resume(self, found: Trial) -> None:
        reason = found.reason or UNFINISHED
        self._story = Story(Path(found.old).stem, Path(found.new).stem, reason)
        is_trying = self._part is Part.TRYING
        self._phase = Phase.LOADING if is_trying else Phase.RESTORING
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
    def asked(self) -> Mapping[str, str]:
        """What the operator had asked of services before the switch, where it is taken back."""
        found = self._trial
        if found is None or self._part is not Part.RETURNING or found.boot_id != procfs.boot_id():
            return {}
        return found.asked

    @property
    def expected(self) -> frozenset[str]:
        """The services that it is about to bring up, or that a next daemon is."""
        return self._up if self.is_on else frozenset()

    def note_change(self) -> None:
        """A service is another one now."""
        self._woken.set()

    # --- the first daemon

    def begin(self, new: Loaded) -> None:
        """A switch, to be `run`. Raises LlmsupError while one goes on."""
        self.require_idle()
        self._story = Story(self._loaded.name, new.name)
        self._phase, self._result, self._is_handed_over = Phase.CHECKING, None, False
        self._began_at = time.monotonic()

    async def run(self, target: str, new: Loaded) -> None:
        """Look at the profile that is called `target`, and hand over to it."""
        if new.path == self._loaded.path:
            self._remember(target)
            await self._end(Phase.SWITCHED, was_serving=True)
            return
        try:
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
            if service.state is not State.READY
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
        self._is_handed_over = True
        self._hand_over(profile)

    # --- those after it

    def take_over(self, taken: Takeover, up: Sequence[str]) -> None:
        """`up` are to come up, and these of them were adopted. To be called before any is started.

        Models that differ leave together, and get no request any more from the first moment on:
        none is answered by a model of the other profile, and each is planned with the room of all.
        """
        if self._part is Part.NONE:
            return
        services, keepers = self._supervisor.services, self._supervisor.keepers
        touched = [name for name in up if name not in taken.adopted - taken.outdated]
        models = [name for name in touched if keepers[name].unit.model is not None]
        self._up = frozenset(up)
        self._last = {name: services[name].generation for name in touched}
        self._proofs = dict.fromkeys(models)
        self._rolls.leave_together(taken.outdated.intersection(models))
        for name in models:
            last = FOREVER if self._part is Part.TRYING else self._last[name] + 1
            self._withheld[name] = range(last)

    async def watch(self) -> None:
        """Bring it to an end. Cancelled, it leaves everything as it is."""
        try:
            verdict = await self._judged()
            is_trying = self._part is Part.TRYING
            if isinstance(verdict, Passed):
                if is_trying and self._trial is not None:
                    self._remember(self._trial.target)
                await self._end(Phase.SWITCHED if is_trying else Phase.RESTORED)
            elif isinstance(verdict, Failed):
                await (self._go_back if is_trying else self._give_up)(verdict.reason)
        except asyncio.CancelledError:
            self._break_off("the stack stops")
            raise
        except Exception as error:
            log.exception("the switch broke")
            await self._give_up(f"{type(error).__name__}: {error}")

    async def _judged(self) -> Verdict:
        while isinstance(verdict := self._judge(), Pending):
            self._woken.clear()
            try:
                async with asyncio.timeout(LOOK_PERIOD_S):
                    await self._woken.wait()
            except TimeoutError:
                pass
        return verdict

    def _judge(self) -> Verdict:
        is_trying = self._part is Part.TRYING
        if is_trying:
            self._prove_ready()
        passed_over = set() if self._trial is None else set(self._trial.unready)
        if is_trying:
            passed_over -= self._proofs.keys()
        services = self._supervisor.services
        faults = {
            name: "" if not is_trying else proof.result() if proof and proof.done() else None
            for name, proof in self._proofs.items()
        }
        return trial.judge(
            [services[name] for name in self._up if name not in passed_over],
            self._last,
            faults,
            is_rolling=bool(self._rolls.pending or self._rolls.leaving),
        )

    def _prove_ready(self) -> None:
        for name, proof in self._proofs.items():
            service = self._supervisor.services[name]
            is_new = service.generation > self._last[name]
            if proof is None and is_new and service.state in {State.READY, State.UNREADY}:
                self._note_load(name, time.monotonic() - service.started_at)
                self._proofs[name] = asyncio.create_task(self._prove(name))

    async def _prove(self, name: str) -> str:
        """What is wrong with the server of a model; empty where it may answer from now on."""
        port, model = self._supervisor.keepers[name].port, self._model(name)
        fault = ""
        if port is not None:
            served = await served_model(port)
            is_other = served and Path(served) != model
            fault = f"it serves {served}" if is_other else await token_fault(port)
        if not fault:
            self._let_in([name])
        self._woken.set()
        return fault

    async def _go_back(self, reason: str) -> None:
        """Hand over to a daemon with the old profile, as long as that can be started."""
        if self._trial is None or self._story is None:
            return
        self._phase = Phase.RESTORING
        log.error("going back to %s: %s", self._story.old, reason)
        self._trial = replace(self._trial, reason=reason)
        try:
            await self._require_startable(self._trial.old)
        except LlmsupError as error:
            why_lost = "; ".join(error.message.splitlines())
            await self._end(Phase.STUCK, reason=reason, why_lost=why_lost)
            return
        try:
            self._chosen.try_out(self._trial)
        except OSError as error:
            log.error("it is not remembered why: %s", error)
        await self._wait_quiet()
        self._give_way(self._trial.old)

    async def _wait_quiet(self) -> None:
        """Until nothing is being ended: the next daemon would adopt it."""
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        while time.monotonic() < deadline:
            states = {each.state for each in self._supervisor.services.values()}
            if State.STOPPING not in states and not self._strays.are_ending:
                return
            await asyncio.sleep(LOOK_PERIOD_S)

    async def _give_up(self, reason: str) -> None:
        """What ran before does not come back at once."""
        if self._part is Part.TRYING:
            await self._end(Phase.STUCK, reason=reason, why_lost="see the daemon's log")
        else:
            await self._end(Phase.LOST, why_lost=reason)

    # --- what is told

    async def follow(self) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """How far it is, again and again, and what came of it at last.

        Without a result it ends where another daemon goes on with it.
        """
        if self._story is None:
            raise LlmsupError("nothing is being switched", hint="llmsup events shows what was")
        return self._followed()

    async def _followed(self) -> AsyncIterator[SwitchProgress | SwitchResult]:
        yield self._progress()  # at least once: the client is to know that there is more to come
        told, told_at = self._phase, time.monotonic()
        while self._result is None and not self._is_handed_over:
            if told is not self._phase or time.monotonic() >= told_at + TELL_PERIOD_S:
                told, told_at = self._phase, time.monotonic()
                yield self._progress()
            await asyncio.sleep(LOOK_PERIOD_S)
        if self._result is not None:
            yield self._result

    def _progress(self) -> SwitchProgress:
        services, story = self._supervisor.services, self._story
        loading = [
            name
            for name in self._proofs
            if services[name].generation <= self._last[name]
            or services[name].state not in {State.READY, State.UNREADY}
        ]
        if self._part is Part.TRYING and self._phase in {Phase.LOADING, Phase.VERIFYING}:
            self._phase = Phase.LOADING if loading or not self._proofs else Phase.VERIFYING
        loading.sort(key=lambda name: services[name].pid is None)
        name = loading[0] if loading else ""
        model = self._model(name)
        pid = services[name].pid if name else None
        whole_bytes = size_bytes(model) if model else 0
        taken_bytes = procfs.bytes_taken_in(pid) if pid else 0
        return {
            "phase": self._phase.value,
            "profile": story.new if story else "",
            "service": name,
            "model": model.name if model else "",
            "elapsed_s": round(time.monotonic() - self._began_at, 3),
            "read_bytes": min(taken_bytes, whole_bytes),
            "size_bytes": whole_bytes,
            "last_load_s": self._chosen.last_load_s(model) if model else None,
            "why": services[name].why if name else "",
        }

    def _model(self, name: str) -> Path | None:
        spec = self._loaded.profile.service.get(name)
        return Path(spec.model) if isinstance(spec, LlamaServer) else None

    # --- the end

    def _let_in(self, names: Sequence[str]) -> None:
        for name in names:
            self._withheld.pop(name, None)
        self._publish()

    def _remember(self, profile: str | None) -> None:
        try:
            self._chosen.end_trial(profile)
        except OSError as error:
            log.error("what was switched to is not remembered: %s", error)

    def _note_load(self, name: str, load_s: float) -> None:
        model = self._model(name)
        try:
            if model is not None:
                self._chosen.note_load(model, load_s)
        except OSError as error:
            log.warning("how long it took is not remembered: %s", error)

    async def _end(
        self, phase: Phase, *, reason: str = "", why_lost: str = "", was_serving: bool = False
    ) -> None:
        if self._story is None:
            return
        story = Story(
            self._story.old,
            self._story.new,
            reason or self._story.reason,
            why_lost,
            was_serving,
        )
        self._phase = phase
        if self._chosen.trial is not None:
            self._remember(None)
        self._let_in(list(self._proofs))
        self._finish(message(phase, story), await self._current_model())

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
        }

    async def _current_model(self) -> str | None:
        """The model that the first route with a ready service is answered by."""
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
