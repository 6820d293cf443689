"""Switches a service to another model, one switch at a time; `core.switching` decides.

The choice is on disk only once the target has proved itself, so a daemon that is killed before
that leaves a profile in which what ran before is what is wanted.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmsup.attendance import Unit
from llmsup.card_gate import CardGate
from llmsup.choosing import Change, Chosen
from llmsup.config.choice import Choice
from llmsup.config.load import Loaded
from llmsup.config.models import size_bytes
from llmsup.config.schema import LlamaServer
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.core.service import Service, State, Want
from llmsup.core.switching import (
    BESIDE,
    ENDS,
    Action,
    Event,
    Phase,
    Story,
    message,
    observe,
    observe_beside,
    observe_return,
    step,
)
from llmsup.errors import LaunchError, LlmsupError
from llmsup.host import gguf, ports, procfs
from llmsup.host.journal import Journal
from llmsup.host.model_server import served_model, token_fault
from llmsup.keeper import Keeper
from llmsup.room import Beside, Room
from llmsup.services.launch import Launch
from llmsup.supervisor import Supervisor
from llmsup.understudy import Enter, Understudy

log = logging.getLogger(__name__)

FOREVER = 2**63
SPARE_GENERATIONS = 100
"""So often may what runs be restarted before its numbers meet that of a target beside it."""
LOOK_PERIOD_S = 0.05
TELL_PERIOD_S = 0.5


@dataclass(eq=False)
class Switch:
    """One switch that goes on, or has ended."""

    change: Change
    story: Story
    began_at: float
    result: asyncio.Future[SwitchResult]
    phase: Phase = Phase.CHECKING
    beside: Beside | None = None  # how the target fits beside what runs
    holds_card: bool = False  # nobody else may be placed meanwhile
    is_called_off: bool = False  # an operator stopped the target
    took_bytes: int | None = None  # of the card, beside what runs
    understudy: Understudy | None = None
    first_generation: int = 0  # that is the target
    spawned_at: float | None = None
    returning: dict[str, int] = field(default_factory=dict)
    proof: asyncio.Task[str] | None = None

    @property
    def has_two_of_target(self) -> bool:
        """Whether what runs and what takes its place are the same service, both up."""
        return self.beside is not None and self.change.target in self.change.generations


class Switching:
    """The switches of one stack.

    `take` makes another profile the one that is in force. `rebuild` is the unit of a service as a
    profile has it; a port of None is the one it has. `enter` makes an understudy, and `see_off`
    ends the generation of a service whose place was taken, and that was launched so. `withheld`
    are the generations that get no requests; `publish` has the lists follow it. `save` has the next
    daemon know what is wanted and where it listens.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        gate: CardGate,
        chosen: Chosen,
        journal: Journal,
        *,
        take: Callable[[Loaded], None],
        rebuild: Callable[[str, Loaded, int | None], Unit],
        room: Room,
        enter: Enter,
        see_off: Callable[[Service, Launch | None], None],
        withheld: dict[str, range],
        publish: Callable[[], None],
        save: Callable[[], None],
    ) -> None:
        self._supervisor = supervisor
        self._gate = gate
        self._chosen = chosen
        self._journal = journal
        self._take = take
        self._rebuild = rebuild
        self._room = room
        self._enter = enter
        self._see_off = see_off
        self._withheld = withheld
        self._publish = publish
        self._save = save
        self._clock = asyncio.get_running_loop().time
        self._woken = asyncio.Event()
        self._last_beside: dict[str, int] = {}  # by service, the generation that was tried so
        self.current: Switch | None = None

    def require_idle(self) -> None:
        """Raise LlmsupError while a switch goes on."""
        if self.current is not None:
            story = self.current.story
            raise LlmsupError(
                f"{story.target} is being switched to {story.model}",
                hint="try again once that has ended; llmsup events shows it",
            )

    def begin(self, change: Change) -> Switch:
        """A switch to be `run`. Raises LlmsupError while another one goes on."""
        self.require_idle()
        keepers = self._supervisor.keepers
        before = ", ".join(
            f"{name} ({keepers[name].model})"
            for name in change.generations
            if keepers[name].service.state in {State.READY, State.UNREADY, State.STARTING}
        )
        story = Story(change.target, change.model.name, before)
        result = asyncio.get_running_loop().create_future()
        self.current = Switch(change, story, self._clock(), result)
        return self.current

    @property
    def expected(self) -> frozenset[str]:
        """The services that the present switch is about to bring up."""
        if self.current is None:
            return frozenset()
        change = self.current.change
        if self.current.phase is Phase.RESTORING:
            return frozenset(change.generations)
        return frozenset({change.target})

    @property
    def on_card(self) -> tuple[str, ...]:
        """What is on the card without being a service of the profile, in words."""
        current = self.current
        return (f"the switch of {current.change.target}",) if current and current.holds_card else ()

    def why(self, service: str) -> str:
        """What a service that goes on serving is to know of a switch."""
        current = self.current
        is_beside = current is not None and current.phase in BESIDE
        if current is None or not is_beside or service not in current.change.generations:
            return ""
        return f"{current.story.model} is loaded beside it, to take its place"

    def note_change(self) -> None:
        """A service is another one now."""
        self._woken.set()

    def note_stop(self, services: Collection[str]) -> None:
        """An operator stops these, and has the last word."""
        if self.current is not None and self.current.change.target in services:
            self.current.is_called_off = True
            self._woken.set()

    async def run(self, switch: Switch) -> None:
        """Bring it to an end. Cancelled, it leaves the services as they are."""
        try:
            event = await self._check(switch)
            while True:
                before = switch.phase
                switch.phase, action = step(before, event)
                log.info("switch service=%s phase=%s", switch.story.target, switch.phase.value)
                await self._perform(action, switch)
                if switch.phase in ENDS:
                    break
                event = await self._next_event(switch)
            self._end(switch, await self._result(switch))
            self._withheld.pop(switch.change.target, None)
        except asyncio.CancelledError:
            # What has not proved itself stays withheld: requests still come in.
            self._break_off(switch, "the stack stops")
            raise
        except Exception as error:
            log.exception("the switch of %s broke", switch.story.target)
            if switch.phase in BESIDE or switch.understudy is not None:
                await self._drop(switch)
            elif switch.story.target in self._withheld:
                await self._restore(switch)
            self._break_off(switch, f"{type(error).__name__}: {error}")
            self._withheld.pop(switch.change.target, None)

    async def follow(self, switch: Switch) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """How far it is, again and again, and what came of it at last."""
        told, told_at = None, 0.0
        while not switch.result.done():
            if told is not switch.phase or self._clock() >= told_at + TELL_PERIOD_S:
                told, told_at = switch.phase, self._clock()
                yield self.progress(switch)
            await asyncio.wait([switch.result], timeout=LOOK_PERIOD_S)
        yield switch.result.result()

    def progress(self, switch: Switch) -> SwitchProgress:
        """How far it is."""
        service = self._target(switch).service
        loading = {Phase.LOADING, Phase.LOADING_BESIDE}
        is_loading = switch.phase in loading and service.pid is not None
        model_bytes = size_bytes(switch.change.model)
        taken_bytes = procfs.bytes_taken_in(service.pid or 0) if is_loading else 0
        return {
            "phase": switch.phase.value,
            "service": switch.story.target,
            "model": switch.story.model,
            "elapsed_s": round(self._clock() - switch.began_at, 3),
            "read_bytes": min(taken_bytes, model_bytes),
            "size_bytes": model_bytes,
            "last_load_s": self._chosen.last_load_s(switch.change.model),
            "why": service.why if switch.phase is not Phase.CHECKING else "",
        }

    # --- what happens

    async def _check(self, switch: Switch) -> Event:
        """Whether anything speaks against it, and whether there is anything to do."""
        change = switch.change
        keeper = self._supervisor.keepers[change.target]
        if not change.leaving and keeper.service.state is State.READY and keeper.port is not None:
            served = await served_model(keeper.port) or _model(change.old, change.target)
            if Path(served) == change.model:
                switch.story = replace(switch.story, was_serving=True)
                return Event.FOUND_SERVING
        try:
            await asyncio.to_thread(gguf.require_loadable, change.model)
            await self._room.wait_calm()
            switch.holds_card = True
            switch.beside = await self._room.look(change)
        except LlmsupError as error:
            return self._failed(switch, Event.REFUSED, error.message)
        finally:
            switch.holds_card = switch.has_two_of_target
        if self._is_called_off(switch):
            return Event.STOPPED
        if keeper.service.missing:
            why = f"it would wait for {', '.join(keeper.service.missing)} to be ready"
            return self._failed(switch, Event.REFUSED, why)
        switch.first_generation = self._next_generation(switch)
        try:
            # From here on a daemon that is killed over it undoes it.
            self._chosen.begin(change.target, switch.first_generation)
        except OSError as error:
            return self._failed(switch, Event.REFUSED, f"nothing can be remembered of it: {error}")
        return Event.ACCEPTED if switch.beside is None else Event.FITS_BESIDE

    def _next_generation(self, switch: Switch) -> int:
        """That of the target. Beside its service, no other process has ever had the number."""
        target = switch.change.target
        generation = self._supervisor.services[target].generation + 1
        if not switch.has_two_of_target:
            return generation
        generation = max(generation + SPARE_GENERATIONS, self._last_beside.get(target, 0) + 1)
        self._last_beside[target] = generation
        return generation

    def _is_called_off(self, switch: Switch) -> bool:
        """Whether nothing is to be started any more, by an operator's word."""
        target = switch.change.target
        was_up, service = target in switch.change.generations, self._supervisor.services[target]
        return switch.is_called_off or (was_up and service.want is Want.DOWN)

    async def _next_event(self, switch: Switch) -> Event:
        while True:
            self._woken.clear()
            event = self._seen(switch)
            if event is not None and step(switch.phase, event)[0] is not switch.phase:
                return event
            await self._woken.wait()

    def _seen(self, switch: Switch) -> Event | None:
        services, change = self._supervisor.services, switch.change
        if switch.phase is Phase.RESTORING:
            returning = [services[name] for name in switch.returning]
            event = observe_return(returning, switch.returning)
            why = "; ".join(f"{each.name}: {each.why}" for each in returning if each.why)
            switch.story = replace(switch.story, why_lost=why)
            return event
        if switch.is_called_off or services[change.target].want is Want.DOWN:
            return Event.STOPPED
        service, last_generation = self._target(switch).service, switch.first_generation - 1
        look = observe_beside if switch.phase in BESIDE else observe
        event = look(service, last_generation)
        if event is Event.SPAWNED and switch.spawned_at is None:
            switch.spawned_at = self._clock()
        if event is Event.FAILED:
            death = service.death
            is_its = death is not None and death.generation > last_generation
            self._failed(switch, event, death.reason if death and is_its else service.why)
        elif event is Event.BECAME_READY and switch.proof is not None and switch.proof.done():
            if fault := switch.proof.result():
                return self._failed(switch, Event.DISPROVED, fault)
            # One that is being restarted is succeeded once its new process is on its way.
            is_ending = services[change.target].state in {State.DRAINING, State.STOPPING}
            return None if switch.understudy and is_ending else Event.PROVED
        if switch.understudy and services[change.target].generation >= switch.first_generation:
            why = f"{change.target} died again and again meanwhile"
            return self._failed(switch, Event.FAILED, why)
        return event

    def _failed(self, switch: Switch, event: Event, reason: str) -> Event:
        switch.story = replace(switch.story, reason=reason)
        return event

    def _target(self, switch: Switch) -> Keeper | Understudy:
        return switch.understudy or self._supervisor.keepers[switch.change.target]

    # --- what is done

    async def _perform(self, action: Action, switch: Switch) -> None:
        match action:
            case Action.REPLACE:
                await self._replace(switch)
            case Action.START_BESIDE:
                self._start_beside(switch)
            case Action.VERIFY:
                self._note_load(switch)
                switch.proof = asyncio.create_task(self._prove(switch))
                switch.proof.add_done_callback(lambda _: self._woken.set())
            case Action.KEEP:
                self._put_in_force(switch.change.target, switch.change.new)
                self._remember(switch.change.choice)
                self._let_in(switch)
            case Action.TAKE_OVER:
                self._take_over(switch)
            case Action.DROP:
                await self._drop(switch)
            case Action.RESTORE:
                await self._restore(switch)
            case Action.GIVE_UP:
                self._put_in_force(switch.change.target, switch.change.old)
                self._let_in(switch)

    def _start_beside(self, switch: Switch) -> None:
        change, first = switch.change, switch.first_generation
        if change.target in change.generations and switch.beside is not None:
            keepers = self._supervisor.keepers.values()
            taken = {port for each in keepers for port in (each.port, each.unit.port) if port}
            unit = self._rebuild(change.target, change.new, ports.free_port(taken))
            switch.understudy = self._enter(unit, first, switch.beside)
            switch.understudy.start()
        else:
            self._withheld[change.target] = range(first, FOREVER)
            self._put_in_force(change.target, change.new)
            self._supervisor.start([change.target])

    def _take_over(self, switch: Switch) -> None:
        """From here on the target has the requests, and what ran before finishes its own.

        No await: what was found out of both when this was decided is still so.
        """
        change, understudy, beside = switch.change, switch.understudy, switch.beside
        if understudy is None or beside is None:
            self._let_in(switch)
            self._supervisor.stop(change.leaving)
            self._save()  # a daemon that is killed now is not followed by one that has both up
            self._remember(change.choice)
            return
        keeper = self._supervisor.keepers[change.target]
        service, launch = keeper.service, keeper.launch
        successor = understudy.yield_place()
        if successor is None:
            raise LaunchError("it ended at the last moment")
        self._put_in_force(change.target, change.new, understudy.unit)
        self._remember(change.choice)
        before = keeper.succeed(successor)
        if before is not None:
            before.watch(lambda _: None)  # it is a child of ours, and reaped by that
        switch.understudy = None
        if understudy.unit.uses_card:
            grant, took_bytes = beside.grant, switch.took_bytes
            self._gate.succeed(change.target, successor.generation, grant, took_bytes)
        self._save()
        self._see_off(service, launch)

    async def _drop(self, switch: Switch) -> None:
        """What ran before has never stopped: only the target ends."""
        understudy, target = switch.understudy, switch.change.target
        if understudy is not None:
            await understudy.end()
            switch.understudy = None
        elif target not in switch.change.generations:
            self._put_in_force(target, switch.change.old)
            await self._supervisor.stop_in_order([target], drain=False)
        switch.holds_card = False

    async def _replace(self, switch: Switch) -> None:
        change = switch.change
        if switch.beside is not None:  # where that was too small for it
            await self._drop(switch)
            switch.beside = None
        if self._is_called_off(switch):
            return
        switch.spawned_at = switch.proof = None
        target = self._supervisor.keepers[change.target]
        switch.first_generation = target.service.generation + 1
        self._begin_anew(switch)
        self._withheld[change.target] = range(switch.first_generation, FOREVER)
        self._put_in_force(change.target, change.new)
        await self._supervisor.stop_in_order(change.leaving)
        if self._is_called_off(switch):
            return
        if target.service.want is Want.UP:
            self._supervisor.restart(change.target)
        else:
            self._supervisor.start([change.target])

    def _begin_anew(self, switch: Switch) -> None:
        with suppress(OSError):  # it was written a moment ago: then only that first number counts
            self._chosen.begin(switch.change.target, switch.first_generation)

    async def _restore(self, switch: Switch) -> None:
        change, target = switch.change, switch.change.target
        # Also where it is ready: it is being ended, and what comes after it may answer.
        generation = self._supervisor.services[target].generation
        self._withheld[target] = range(self._withheld[target].start, generation + 1)
        self._put_in_force(target, change.old)
        if target in change.generations:
            self._supervisor.restart(target, drain=False)
        else:
            await self._supervisor.stop_in_order([target], drain=False)
        services = self._supervisor.services
        # One that is up again, or still, by somebody's word is not started by the next line.
        last = {name: services[name].generation for name in change.leaving}
        up = {name for name in change.leaving if services[name].pid is not None}
        switch.returning = {name: last[name] - (name in up) for name in last}
        if target in change.generations:
            switch.returning[target] = generation
        self._supervisor.start(change.leaving)

    def _put_in_force(self, target: str, loaded: Loaded, unit: Unit | None = None) -> None:
        self._take(loaded)
        self._supervisor.keepers[target].take(unit or self._rebuild(target, loaded, None))
        self._gate.forget(target)

    def _let_in(self, switch: Switch) -> None:
        self._withheld.pop(switch.change.target, None)
        self._publish()

    async def _prove(self, switch: Switch) -> str:
        """What is wrong with the target; empty where it serves what it should."""
        port = self._target(switch).port
        if port is None:
            return ""
        served = await served_model(port)
        if served and Path(served) != switch.change.model:
            return f"it serves {served}"
        # One that was warmed up has generated, and any other prompt would cool it.
        fault = "" if self._target(switch).warm_tokens else await token_fault(port)
        if not fault and switch.understudy is not None and switch.beside is not None:
            switch.took_bytes = switch.beside.took_bytes(await self._gate.read())
        return fault

    # --- the end

    def _remember(self, choice: Choice | None) -> None:
        try:
            self._chosen.end(choice)
        except OSError as error:
            log.error("the choice is not remembered: %s", error)

    def _note_load(self, switch: Switch) -> None:
        if switch.spawned_at is not None:
            try:
                self._chosen.note_load(switch.change.model, self._clock() - switch.spawned_at)
            except OSError as error:
                log.warning("how long it took is not remembered: %s", error)

    async def _result(self, switch: Switch) -> SwitchResult:
        is_switched = switch.phase is Phase.SWITCHED
        if is_switched and not switch.story.was_serving:
            warm_tokens = self._supervisor.keepers[switch.change.target].warm_tokens
            switch.story = replace(switch.story, warm_tokens=warm_tokens)
        words = message(switch.phase, switch.story)
        result = _result_of(switch, words, self._clock())
        names = [switch.change.target] if is_switched else list(switch.change.generations)
        for name in names:
            keeper = self._supervisor.keepers[name]
            if keeper.service.state is State.READY and keeper.port is not None:
                served = Path(await served_model(keeper.port)).name or keeper.model
                return {**result, "service": name, "current_model": served}
        return result

    def _break_off(self, switch: Switch, why: str) -> None:
        words = f"the switch of {switch.story.target} broke off: {why}"
        result = _result_of(switch, words, self._clock())
        self._end(switch, {**result, "success": False})

    def _end(self, switch: Switch, result: SwitchResult) -> None:
        if self._chosen.choice.unfinished:  # nothing was chosen, or it could not be written
            self._remember(switch.change.choice if result["success"] else None)
        self.current = None
        log.info("switch: %s", result["message"])
        self._journal.write("switch", service=switch.story.target, why=result["message"])
        switch.result.set_result(result)


def _result_of(switch: Switch, words: str, now: float) -> SwitchResult:
    return {
        "success": switch.phase is Phase.SWITCHED,
        "message": words,
        "current_model": None,
        "service": None,
        "profile": switch.change.old.name,
        "switch_time_s": round(now - switch.began_at, 3),
        "warm_tokens": switch.story.warm_tokens,
    }


def _model(loaded: Loaded, service: str) -> str:
    spec = loaded.profile.service[service]
    return spec.model if isinstance(spec, LlamaServer) else ""
