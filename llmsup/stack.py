"""The stack: supervisor and gateway joined. Upstream lists follow states; the API asks here."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llmsup import __version__, models_api
from llmsup.activator import Activator
from llmsup.adoption import Remembering, take_over
from llmsup.attendance import Unit
from llmsup.bookkeeping import Books
from llmsup.card_gate import CardGate
from llmsup.card_news import CardNews
from llmsup.card_watch import CardWatch
from llmsup.choosing import Change, Chosen, as_of, profile_file, propose, propose_swap
from llmsup.chronicle import Chronicle
from llmsup.config.files import digest
from llmsup.config.listen import parse_listen
from llmsup.config.load import Loaded
from llmsup.config.paths import Paths
from llmsup.config.schema import Profile
from llmsup.control.wire import (
    Answer,
    ModelInfo,
    Status,
    SwitchProgress,
    SwitchResult,
    UpstreamsInfo,
)
from llmsup.core import card, offload
from llmsup.core.leases import Lease
from llmsup.core.routing import effective_routes
from llmsup.core.service import Service, State, Want
from llmsup.departures import Departures
from llmsup.errors import LaunchError, LlmsupError, ModelFileError, UsageError
from llmsup.eviction import Eviction
from llmsup.evidence import Evidence
from llmsup.feasibility import require_feasible
from llmsup.gateway import Gateway
from llmsup.host import memory
from llmsup.host.clocks import read_clocks
from llmsup.host.journal import Journal
from llmsup.host.leftovers import home_mark
from llmsup.host.nvml import Nvml
from llmsup.host.probe import says_close
from llmsup.host.process import find
from llmsup.host.rotation import Rotated, keep_rotated
from llmsup.host.shortage import keep_watch
from llmsup.on_demand import OnDemand
from llmsup.placing import Placed, Placing, short_bytes
from llmsup.preflight import load_startable
from llmsup.profile_switching import ProfileSwitching
from llmsup.publication import Publication
from llmsup.rebalancing import Rebalancing
from llmsup.rolls import Rolls
from llmsup.room import Beside, Room
from llmsup.services import envoy
from llmsup.sizing import Sizing
from llmsup.snapshot import gpu_info, model_infos, service_info
from llmsup.strays import Strays
from llmsup.succession import Succession
from llmsup.supervisor import Supervisor
from llmsup.swaps import Swaps
from llmsup.switching import Switch, Switching
from llmsup.troubles import Troubles
from llmsup.understudy import Understudy
from llmsup.units import GATEWAY, active, away, build, rebuilt, takes_turns, wanted, warm
from llmsup.warmth import Warmth

log = logging.getLogger(__name__)

EVENTS_MAX_BYTES = 4 * 1024 * 1024
EVENTS_KEEP = 3
IN_FLIGHT_PERIOD_S = 0.02
SETTLE_TIMEOUT_S = 3.0
FIRST_READING_TIMEOUT_S = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
"""Those that the daemon answers. They are blocked while one takes the place of another."""


class Stack:
    """Everything one daemon keeps: the services of one profile and their gateway."""

    def __init__(
        self,
        loaded: Loaded,
        paths: Paths,
        environ: Mapping[str, str],
        troubles: Troubles,
        *,
        is_heir: bool = False,
    ) -> None:
        profile = loaded.profile
        self._loaded = loaded
        self._paths = paths
        self._environ = environ
        self._digest = digest(loaded.path)
        self._started_at = time.monotonic()
        self._wanted = wanted(profile)
        routes = effective_routes(profile)
        self._troubles = troubles
        self._journal = Journal(paths.events, troubles)
        self._news = CardNews(self._journal)
        self._books = Books(paths.ledger, troubles)
        self._sizing = Sizing(profile, environ, lambda: self._books.ledger, paths.engines)
        self.gateway = Gateway(
            paths.gateway,
            routes,
            parse_listen(profile.gateway.listen),
            loaded.api_keys,
            profile.gateway.allowed_origins,
            admin_keys=loaded.admin_keys,
            troubles=troubles,
        )
        self._memory = memory.load(paths.memory, str(loaded.path)).services
        last_ports = {name: each.port for name, each in self._memory.items() if each.port}
        self._strays = Strays()
        self._warmth = Warmth(paths.slots, paths.slot_index, self._journal)
        units = build(profile, paths, environ, last_ports, lambda: self._card.is_busy)
        users = {unit.name: unit.rank for unit in units if unit.uses_card}
        self._gate = CardGate(
            Nvml(profile.gpu.device).read,
            Placing(self._sizing, offload.plan),
            users,
            lambda: self._supervisor.services,
            eviction=Eviction(
                users,
                profile.min_dwell_s,
                leases=lambda: self._gate.leases,
                services=lambda: self._supervisor.services,
                on_demand=lambda: self._on_demand,
            ),
            leaving=lambda: (
                *self._strays.card_users,
                *self._switching.on_card,
                *self._rolls.leaving,
            ),
            is_loading=lambda name: self._supervisor.keepers[name].is_loading(),
            short_bytes=short_bytes,
            on_placed=self._news.note_placed,
            on_measured=self._note_measured,
            on_no_card=self._news.note_no_card,
            retry=lambda name: self._supervisor.keepers[name].try_again(),
            renew=self._renew_cardless,
        )
        self._card = CardWatch(self._gate.read, read_clocks, self._note_card)
        self._chronicle = Chronicle(
            self._journal,
            Evidence(
                paths.crashes,
                secrets=lambda: (*loaded.api_keys, *loaded.admin_keys),
                gpu=lambda: gpu_info(self._card.device),
            ),
            past=self._gate.past,
        )
        self._supervisor = Supervisor(
            units,
            self._memory,
            on_change=self._note_change,
            on_death=self._chronicle.note_death,
            drain_requests=self._drain_requests,
            warmth=self._warmth,
            troubles=troubles,
            is_leaving=lambda pid: self._strays.has(pid) or self._rolls.is_leaving(pid),
            card=self._gate,
            succeed=self._succeed,
        )
        self._succession = Succession(
            self._supervisor.keepers[GATEWAY],
            self.gateway.admin,
            trial=self.gateway.trial,
            binary=envoy.program,
            predecessor_socket=self.gateway.predecessor_socket,
        )
        self._departures = Departures(
            self._strays,
            self._supervisor,
            self.gateway,
            self._succession,
            self._warmth,
            keep=self._keep,
            is_unsettled=lambda: bool(self._unsettled),
            is_ending=lambda: self._ending is not None,
        )
        self._swaps = Swaps(
            profile,
            self._journal,
            services=lambda: self._publication.services,
            waiting=lambda: self.activator.waited_for,
            is_busy=lambda: self._is_switching or self._is_over,
            begin=self._swap,
            on_change=self._note_turns,
        )
        self._on_demand = OnDemand(
            profile,
            self._supervisor,
            self.gateway,
            self._journal,
            self._swaps,
            services=lambda: self._publication.services,
            expected=lambda: self._switching.expected | self._profiles.expected,
            is_unsettled=lambda: bool(self._unsettled),
        )
        self.activator = Activator(
            routes, self._on_demand, profile.gateway.hold_timeout_s, models_api.app(routes, self)
        )
        self._publication = Publication(
            self.gateway,
            routes,
            self._supervisor.keepers,
            self._journal,
            is_cold=self._on_demand.is_cold,
            status=self._on_demand.status,
        )
        self._rolls = Rolls(self._supervisor, self._keep)
        self._rebalancing = Rebalancing(
            profile.gpu.rebalance,
            self._card,
            self._gate,
            sizer=self._sizing,
            users=users,
            routes=routes,
            services=lambda: self._supervisor.services,
            in_flight=self.gateway.in_flight,
            is_busy=self._is_changing,
            restart=lambda name: self._rolls.restart([name]),
            journal=self._journal,
            troubles=troubles,
        )
        self._unsettled: set[str] = set()  # adopted, and not yet seen to be ready or not
        self._remembering = Remembering(
            paths.memory,
            str(loaded.path),
            self._wanted,
            self._supervisor.keepers,
            troubles,
            measured_bytes=self._measured_bytes,
            asleep=self._on_demand.asleep,
        )
        self._chosen = Chosen(paths.choices, str(loaded.path))
        self._switching = Switching(
            self._supervisor,
            self._gate,
            self._chosen,
            self._journal,
            take=self._take,
            rebuild=self._rebuilt,
            room=Room(self._gate, lambda: self._supervisor.services, self._sizing_of),
            enter=self._enter,
            see_off=self._departures.see_off,
            withheld=self._publication.withheld,
            publish=self._publish,
            save=self._remembering.now,
        )
        self._profiles = ProfileSwitching(
            loaded,
            self._chosen,
            self._supervisor,
            self._journal,
            is_heir=is_heir,
            rolls=self._rolls,
            strays=self._strays,
            require_startable=self._require_startable,
            require_feasible=self._require_feasible,
            asked=lambda: self._remembering.asked,
            hand_over=self._leave_to,
            withheld=self._publication.withheld,
            publish=self._publish,
        )
        self.heir = (str(loaded.path), loaded.overrides)  # the profile of the next daemon
        self._tasks: set[asyncio.Task[None]] = set()
        self._switch: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self.on_change: Callable[[], None] = lambda: None  # told of whatever `status` shows
        self.stopped = asyncio.Event()
        self.handed_over = asyncio.Event()

    async def prepare(self) -> None:
        """Find out what a launch has to know: of each version of a program once, and which card."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_READING_TIMEOUT_S):
                await self._gate.read()
        for keeper in self._supervisor.keepers.values():
            if keeper.unit.prepare is not None:
                with suppress(LaunchError):  # the launch says it, too
                    await asyncio.to_thread(keeper.unit.prepare)

    def begin(self) -> None:
        """Take over what is alive, bring up what else is wanted, and see to it from now on.

        The lists stay as they are until it is known which of the adopted services are ready:
        written earlier, they would be without services that answer at this very moment.
        """
        self._journal.write("daemon", why=f"started with profile {self._loaded.name}")
        asked = {name: each.asked for name, each in self._memory.items()} | self._undone()
        asked |= self._profiles.asked_before
        down = {name for name, each in asked.items() if each == "down"}
        down |= self._on_demand.recall(asked)
        up = [
            name
            for name in self._supervisor.keepers
            if asked.get(name) == "up" or (name in self._wanted and name not in down)
        ]
        self._warmth.begin(warm(self._loaded.profile))
        found = find(home_mark(self._paths))
        self.gateway.prepare(takes_over=any(each.service == GATEWAY for each in found))
        self._unsettled = {each.service for each in found}
        taken = take_over(found, self._supervisor.keepers, up, self._chosen.choice.unfinished)
        self._profiles.take_over(taken, up)
        self._undo_switch()
        self._rolls.outdated = taken.outdated
        # A new Envoy has no lists to be kept: whoever is ready helps.
        self._unsettled &= taken.adopted if GATEWAY in taken.adopted else frozenset()
        if taken.adopted:
            log.info("adopted %s", _listed(sorted(taken.adopted)))
            self._journal.write("daemon", why=f"adopted {_listed(sorted(taken.adopted))}")
        self._departures.begin(found, taken)
        self._supervisor.start((name for name in up if name not in taken.adopted), forgive=False)
        asyncio.get_running_loop().call_later(SETTLE_TIMEOUT_S, self._settle, *self._unsettled)
        self._settle()
        if GATEWAY in taken.adopted - taken.outdated:
            self._keep(self._mend_drained_gateway())
        self._keep(self.gateway.keep_confirmed(self._note_confirmed))
        self._keep(self._on_demand.keep())
        self._keep(self._swaps.keep())
        self._keep(self._card.keep())
        self._keep(self._gate.keep())
        self._keep(self._rebalancing.keep())
        self._keep(self._warmth.keep())
        self._keep(keep_rotated(self._logs(), self._troubles))
        self._keep(keep_watch(self._paths.logs, self._troubles))
        self._keep(self._troubles.keep_trying())
        if self._profiles.is_on:
            self._keep_switch(self._profiles.watch())

    def _undone(self) -> dict[str, str]:
        """Which models are up after a switch of single mode that is undone: the one before it."""
        profile = self._loaded.profile
        models = takes_turns(profile)
        if models.keys().isdisjoint(self._chosen.choice.unfinished):
            return {}
        return {name: "up" if name == active(profile) else "down" for name in models}

    def _undo_switch(self) -> None:
        """Forget one that an earlier daemon did not finish; what it started was not adopted."""
        touched = self._chosen.choice.unfinished
        if not touched:
            return
        with self._troubles.watched("the end of a switch is not remembered"):
            self._chosen.end()
        words = f"undoes an unfinished switch of {_listed(touched)}"
        log.info(words)
        self._journal.write("daemon", why=words)

    # --- what the control API asks

    def status(self) -> Status:
        """The whole stack as it is now, and the card as it was read last."""
        self._card.ask()
        return Status(
            daemon={
                "pid": os.getpid(),
                "version": __version__,
                "uptime_s": time.monotonic() - self._started_at,
                "profile": self._loaded.name,
                "profile_path": str(self._loaded.path),
                "profile_digest": self._digest,
                "overrides": list(self._loaded.overrides),
                "mode": self._loaded.profile.mode,
                "stopping": self._ending is not None,
                "troubles": self._troubles.sentences,
                "restarting": self._rolls.pending,
            },
            gpu=gpu_info(self._card.device),
            gpu_why=self._card.why,
            gateway=self._loaded.profile.gateway.listen,
            services=[
                service_info(
                    keeper.service,
                    keeper.unit,
                    keeper.port,
                    time.monotonic(),
                    lease=self._gate.lease(name),
                    model=keeper.model,
                    why=self._on_demand.why(keeper.service) or self._switching.why(name),
                    trouble=self._trouble() if name == GATEWAY else self._rebalancing.why(name),
                )
                for name, keeper in self._supervisor.keepers.items()
            ],
            routes=self._publication.route_infos(),
        )

    def upstreams(self) -> list[UpstreamsInfo]:
        """Each route's list as desired, as published, and as Envoy has it."""
        return self._publication.upstreams()

    def start(self, names: tuple[str, ...]) -> Answer:
        """Want services up (none named: those the profile wants); failed ones are tried anew.

        In single mode a model takes the place of the one that is up. Raises LlmsupError where a
        switch goes on that it would disturb.
        """
        chosen = self._known(names) or self._wanted
        idle = tuple(name for name in chosen if self._is_idle(name))
        self._refuse_while_ending()
        self._supervisor.start(self._without_swapped(idle))
        return Answer(changed=list(idle), message=f"starting {_listed(idle)}" if idle else "")

    def stop(self, names: tuple[str, ...], *, now: bool) -> Answer:
        """Want services down, drained first unless `now`."""
        self._refuse_once_handed_over()
        services = self._supervisor.services
        up = tuple(name for name in self._known(names) if not services[name].is_down)
        self._switching.note_stop(names)
        self._keep(self._supervisor.stop_in_order(up, drain=not now))
        return Answer(changed=list(up), message=f"stopping {_listed(up)}" if up else "")

    def restart(self, names: tuple[str, ...], *, now: bool) -> Answer:
        """New processes, one service after another, so that a route's other service answers.

        None named: every service that is wanted up, but not the gateway, which serves them all.
        Raises LlmsupError, as `start`.
        """
        self._refuse_while_ending()
        services = self._supervisor.services
        chosen = self._known(names) or tuple(
            name
            for name, service in services.items()
            if service.want is Want.UP and name != GATEWAY
        )
        self._rolls.restart(self._without_swapped(chosen), drain=not now)
        return Answer(changed=list(chosen), message=f"restarting {_listed(chosen)}")

    async def models(self) -> list[ModelInfo]:
        """What each model server says it serves."""
        return await model_infos(self._loaded.profile, self._supervisor.keepers)

    async def switch(
        self, target: str, model: str | None
    ) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """Have a service serve another model file, or that of the profile; see `Switching`.

        Or another profile: see `ProfileSwitching`. Raises UsageError and ConfigError for what
        cannot be meant, LlmsupError while a switch goes on; then nothing changes.
        """
        self._refuse_while_ending()
        self._refuse_while_switching()
        if (profile := profile_file(target, model, self._loaded, self._paths)) is not None:
            return await self._switch_profile(target, profile)
        services = self._supervisor.services
        change = await asyncio.to_thread(
            propose,
            target,
            model,
            self._loaded,
            choice=self._chosen.choice,
            services=services,
            environ=self._environ,
            home=self._paths,
        )
        self._refuse_while_ending()
        return self._switching.follow(self._begin(as_of(change, self._supervisor.services)))

    def _swap(self, target: str) -> asyncio.Future[SwitchResult]:
        """Have a service take the place of the model that is up. Raises LlmsupError."""
        self._refuse_while_ending()
        services, choice = self._supervisor.services, self._chosen.choice
        return self._begin(
            propose_swap(target, self._loaded, choice=choice, services=services)
        ).result

    def _without_swapped(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The others of `names`, once those have begun to be swapped in that would be a second one.

        Raises LlmsupError where they cannot be.
        """
        services, profile = self._supervisor.services, self._loaded.profile
        down = {name for name in takes_turns(profile) if services[name].want is Want.DOWN}
        down &= set(names)
        if down:
            self._refuse_while_switching()  # that one knows what is up, and has it leave
        swapped = down & away(profile)
        for name in swapped:
            self._swap(name)
        return tuple(name for name in names if name not in swapped)

    def _begin(self, change: Change) -> Switch:
        self._profiles.require_idle()
        switch = self._switching.begin(change)
        self._keep_switch(self._switching.run(switch))
        return switch

    async def _switch_profile(
        self, target: str, path: Path
    ) -> AsyncIterator[SwitchProgress | SwitchResult]:
        new = await self._require_startable(str(path))
        self._refuse_while_ending()
        self._refuse_while_switching()
        self._profiles.begin(new)
        self._keep_switch(self._profiles.run(target, new))
        return self._profiles.follow()

    def follow_switch(self) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """How far a switch to another profile is, or what came of the last one.

        Raises LlmsupError where there was none.
        """
        return self._profiles.follow()

    def shut_down(self, *, now: bool) -> Answer:
        """Stop everything, the gateway first; `stopped` is set at the end. Returns at once."""
        if self.handed_over.is_set():
            # Blocked here and kept over the execve: the new daemon gets it, and obeys.
            signal.raise_signal(signal.SIGTERM)
            return Answer(changed=[], message="stopping")
        if self._ending is None:
            self._rolls.cancel()
            if self._switch is not None:
                self._switch.cancel()
            self._remembering.forget()
            self._ending = asyncio.get_running_loop().create_task(self._end(drain=not now))
        elif now:
            self._supervisor.stop(self._supervisor.services, drain=False)
        return Answer(changed=list(self._supervisor.services), message="stopping")

    async def reload(self) -> Answer:
        """Have a new daemon bring about what the profile says now.

        Raises ConfigError with everything that is wrong with it; then nothing changes.
        """
        self._refuse_while_ending()
        self._refuse_while_switching()
        await self._require_startable(str(self._loaded.path), self._loaded.overrides)
        return self.hand_over()

    def hand_over(self) -> Answer:
        """Leave everything as it is to a new daemon, which is started at once."""
        if self.handed_over.is_set():
            return Answer(changed=[], message="handing over")
        self._refuse_while_switching()
        self._leave_to(str(self._loaded.path), self._loaded.overrides)
        return Answer(changed=[], message="handing over")

    # --- inside

    def _leave_to(self, profile: str, overrides: Sequence[str] = ()) -> None:
        """Let go of everything, for a new daemon with this profile."""
        self._refuse_while_ending()
        self.heir = (profile, tuple(overrides))
        self._rolls.cancel()
        for task in self._tasks:
            task.cancel()
        self._succession.leave_retired()
        for keeper in self._supervisor.keepers.values():
            keeper.disown()
        self._remembering.now()
        # Until the new daemon listens to signals: one that comes in between waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._journal.write("daemon", why="hands over to a new one")
        self.handed_over.set()

    async def _require_startable(self, source: str, overrides: Sequence[str] = ()) -> Loaded:
        return await asyncio.to_thread(
            load_startable,
            source,
            environ=self._environ,
            overrides=overrides,
            home=self._paths,
        )

    async def _require_feasible(self, new: Loaded) -> None:
        await asyncio.to_thread(
            require_feasible,
            new.profile,
            wanted(new.profile),
            sizing=self._sizing_of(new.profile),
            reading=await self._gate.read(),
            coming_back_bytes=self._gate.leases.ours_bytes,
            environ=self._environ,
        )

    def _sizing_of(self, profile: Profile) -> Sizing:
        return Sizing(profile, self._environ, lambda: self._books.ledger, self._paths.engines)

    @property
    def _is_over(self) -> bool:
        """Whether nothing is begun any more: it ends, or another daemon goes on."""
        return self._ending is not None or self.handed_over.is_set()

    def _note_turns(self) -> None:
        """Other services than before can be waited for."""
        self._publish()
        self.activator.note_change()

    def _is_changing(self) -> bool:
        """Whether services are restarted, or are not known to be ready yet."""
        is_settled = not self._unsettled and not self._rolls.pending
        return self._ending is not None or self._is_switching or not is_settled

    @property
    def _is_switching(self) -> bool:
        return self._switching.current is not None or self._profiles.is_on

    def _take(self, loaded: Loaded) -> None:
        """This profile is in force: what is planned, wanted and remembered follows it."""
        self._loaded = loaded
        self._wanted = wanted(loaded.profile)
        self._remembering.want(self._wanted)
        self._sizing.take(loaded.profile)
        self._on_demand.take(loaded.profile)

    def _rebuilt(self, name: str, loaded: Loaded, port: int | None) -> Unit:
        unit, spec = self._supervisor.keepers[name].unit, loaded.profile.service[name]
        unit = unit if port is None else replace(unit, port=port)
        return rebuilt(unit, spec, self._paths, self._environ)

    def _enter(self, unit: Unit, generation: int, beside: Beside) -> Understudy:
        if beside.grant.placement is not None:
            placed = Placed(beside.grant.placement, generation, beside.free_bytes)
            self._news.note_placed(placed)
        return Understudy(
            unit,
            generation,
            beside.grant,
            on_change=self._note_understudy,
            on_death=self._chronicle.note_death,
            warmth=self._warmth,
            troubles=self._troubles,
        )

    def _note_understudy(self, before: Service, after: Service) -> None:
        self._switching.note_change()
        self.on_change()
        if before.state is not after.state:
            words = after.why or "beside the one that serves"
            self._chronicle.note_change(before, replace(after, why=words))

    def _trouble(self) -> str:
        return self.gateway.last_error or self._succession.trouble

    def _settle(self, *names: str) -> None:
        """Publish once nothing is unsettled any more; `names` are no longer waited for.

        Then those that were started otherwise than they would be now are restarted, one by one.
        """
        self._unsettled.difference_update(names)
        self._publish()
        if not self._unsettled:
            self.activator.note_change()
            self._rolls.replace_outdated()

    async def _succeed(self, name: str) -> bool:
        if name != GATEWAY:
            return False
        try:
            return await self._succession.succeed()
        except LlmsupError:
            self._journal.write("succession", service=name, why=self._succession.trouble)
            raise

    async def _mend_drained_gateway(self) -> None:
        """Replace an adopted Envoy that was told to stop: it would drain for ever."""
        keeper = self._supervisor.keepers[GATEWAY]
        while keeper.service.state is State.STARTING:
            await asyncio.sleep(IN_FLIGHT_PERIOD_S)
        if keeper.service.state is State.READY and await says_close(keeper.unit.launch().target):
            log.info("restarting %s: it was stopping when it was adopted", GATEWAY)
            self._rolls.renew([GATEWAY])

    async def _end(self, *, drain: bool) -> None:
        try:
            self._journal.write("daemon", why="stopping")
            self.activator.close("the stack is stopping")
            await self._supervisor.stop_in_order([GATEWAY], drain=drain)
            rest = [name for name in self._supervisor.services if name != GATEWAY]
            await self._supervisor.stop_in_order(rest, drain=drain)
            for task in self._tasks:
                task.cancel()
            self.gateway.remove()
        finally:
            self._journal.write("daemon", why="stopped")
            self.stopped.set()

    def _refuse_while_ending(self) -> None:
        if self._ending is not None:
            raise UsageError("the stack is stopping", hint="llmsup start, once it has stopped")
        self._refuse_once_handed_over()

    def _refuse_while_switching(self) -> None:
        self._switching.require_idle()
        self._profiles.require_idle()

    def _refuse_once_handed_over(self) -> None:
        if self.handed_over.is_set():
            raise LlmsupError("a new daemon takes over just now", hint="try again")

    def _known(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names, seen to be services. Raises UsageError naming the known ones."""
        chosen = tuple(dict.fromkeys(names))
        unknown = [name for name in chosen if name not in self._supervisor.services]
        if unknown:
            raise UsageError(
                f"unknown service: {_listed(unknown)}",
                hint=f"known services: {_listed(self._supervisor.services)}",
            )
        return chosen

    def _is_idle(self, name: str) -> bool:
        service = self._supervisor.services[name]
        return service.want is Want.DOWN or service.state in {State.BACKOFF, State.FAILED}

    def _note_confirmed(self, route: str, elapsed_s: float) -> None:
        self._publication.note_confirmed(route, elapsed_s)
        self.activator.note_change()

    def _note_change(self, before: Service, after: Service) -> None:
        self._follow_change(before, after)
        self.activator.note_change()  # the lists are written by now

    def _follow_change(self, before: Service, after: Service) -> None:
        self._on_demand.note_change(after)
        self._gate.note_change(before, after)
        self._switching.note_change()
        self._profiles.note_change()
        self._remembering.soon()
        self.on_change()
        if after.state is not State.STARTING and after.name in self._unsettled:
            self._settle(after.name)
        is_same = before.state is after.state and before.generation == after.generation
        if not is_same or before.want is not after.want:  # /health names what is wanted
            self._publish()
        if is_same:
            if before.why != after.why and after.state is not State.STARTING:
                log.info("service=%s state=%s why=%s", after.name, after.state.value, after.why)
            return
        self._chronicle.note_change(before, after)
        if after.name == GATEWAY and after.state is State.READY:
            self.gateway.wake()

    def _note_card(self, action: card.Action) -> None:
        is_back = isinstance(action, card.Renew)
        if is_back and self._ending is not None:
            return
        users = self._card_users() if is_back else []
        self._news.note_action(action, users)
        if is_back:
            self._rolls.renew(users)

    def _renew_cardless(self, names: Sequence[str]) -> None:
        if self._ending is None:
            self._news.note_found(names)
            self._rolls.restart(names)

    def _note_measured(self, lease: Lease) -> None:
        self._news.note_measured(lease)
        self._remembering.soon()
        given, keeper = lease.placement, self._supervisor.keepers[lease.service]
        if given is None or keeper.log_start is None or lease.measured_bytes is None:
            return
        with suppress(ModelFileError):  # the file has changed since: it is of another model now
            key = self._sizing.key(lease.service, given.options, self._gate.card)
            took_bytes, log = lease.measured_bytes, keeper.unit.log
            self._books.enter(key, given.price, took_bytes, log, keeper.log_start)

    def _measured_bytes(self, name: str) -> int | None:
        lease = self._gate.lease(name)
        return lease.measured_bytes if lease else None

    def _card_users(self) -> list[str]:
        """The services that are wanted and hold memory of the card."""
        return [
            name
            for name, keeper in self._supervisor.keepers.items()
            if keeper.unit.uses_card and keeper.service.want is Want.UP
        ]

    def _publish(self) -> None:
        if not self._unsettled:
            self._publication.bring_up_to_date()

    async def _drain_requests(self, name: str) -> None:
        if name == GATEWAY:
            await self.gateway.drain_listeners()
            while await self.gateway.requests_active():
                await asyncio.sleep(IN_FLIGHT_PERIOD_S)
            await self._succession.wait_quiet()
            return
        while await self.gateway.in_flight(name):
            await asyncio.sleep(IN_FLIGHT_PERIOD_S)
        if self._ending is None:
            keeper = self._supervisor.keepers[name]
            await self._warmth.save(keeper.service, keeper.launch)

    def _logs(self) -> Iterator[Rotated]:
        limits = self._loaded.profile.logs
        for keeper in self._supervisor.keepers.values():
            yield Rotated(keeper.unit.log, limits.max_size_bytes, limits.keep)
        yield Rotated(self._paths.daemon_log, limits.max_size_bytes, limits.keep)
        yield Rotated(self._paths.events, EVENTS_MAX_BYTES, EVENTS_KEEP)

    def _keep_switch(self, work: Coroutine[object, object, None]) -> None:
        self._switch = self._keep(work)
        self._switch.add_done_callback(lambda _: self._note_turns())
        self._switch.add_done_callback(lambda _: self._swaps.wake())

    def _keep(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self.on_change())
        return task


async def _logged(work: Coroutine[object, object, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a background task of the daemon broke")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
