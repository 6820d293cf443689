"""A profile to units: what the supervisor keeps, with binaries and ports filled in."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmsup.attendance import Unit
from llmsup.config.listen import parse_listen
from llmsup.config.models import parts_of
from llmsup.config.paths import Paths, make_private
from llmsup.config.schema import (
    Command,
    Liveness,
    LlamaServer,
    Profile,
    Qdrant,
    Restart,
    Service,
)
from llmsup.core.grant import UNPLANNED, Grant, written
from llmsup.core.leases import rank
from llmsup.core.routing import Endpoint
from llmsup.core.service import Policy
from llmsup.errors import LaunchError, LlmsupError
from llmsup.host import binaries, engine, envoy_hold, ports
from llmsup.host.leftovers import home_mark
from llmsup.host.process import carries_mark
from llmsup.host.replace import fingerprint
from llmsup.services import command, envoy, llama_options, llama_server, qdrant
from llmsup.services.launch import Launch

log = logging.getLogger(__name__)

GATEWAY = "gateway"
"""The name of Envoy among the services."""

GATEWAY_RESTART = Restart(backoff_s=0.05, max_backoff_s=1.0, max_deaths=8, window_s=5.0)
"""Nothing answers without it and it starts in 0.1 s, so it is tried soon, and again and again."""


def build(
    profile: Profile,
    paths: Paths,
    environ: Mapping[str, str],
    last_ports: Mapping[str, int],
    is_gpu_busy: Callable[[], bool | None],
) -> tuple[Unit, ...]:
    """The gateway's unit and one for each service of the profile, in its order.

    A port that is left out is the one of `last_ports`, so that a live server can be adopted.

    Binaries are looked for at each launch, so one that is installed later is found by a retry.
    """
    taken = {port for service in profile.service.values() for port in _ports(service)}
    taken.add(parse_listen(profile.gateway.listen)[1])
    units = [_gateway(profile, paths, environ)]
    for name, service in profile.service.items():
        port = service.port
        if port is None and isinstance(service, LlamaServer):
            last = last_ports.get(name)
            is_ours = last is not None and last not in taken and _is_ours(last, home_mark(paths))
            port = last if last is not None and is_ours else ports.free_port(taken)
            taken.add(port)
        units.append(_unit(name, service, port, paths, environ, is_gpu_busy=is_gpu_busy))
    return tuple(units)


def rebuilt(unit: Unit, service: Service, paths: Paths, environ: Mapping[str, str]) -> Unit:
    """`unit` as it is for a changed service of the same name, on the same port."""
    return _unit(unit.name, service, unit.port, paths, environ, is_gpu_busy=unit.is_gpu_busy)


def _is_ours(port: int, mark: str) -> bool:
    """Whether nobody but processes of this home listens on the port."""
    holders = ports.owners(port)
    return all(each.pid is not None and carries_mark(each.pid, mark) for each in holders)


def wanted(profile: Profile) -> tuple[str, ...]:
    """The services that `llmsup start` brings up: all, or in single mode one unpinned model.

    Not those that wait for their first request.
    """
    waiting = {name for name, service in profile.service.items() if service.start == "on-demand"}
    idle = waiting | away(profile)
    return (GATEWAY, *(name for name in profile.service if name not in idle))


def takes_turns(profile: Profile) -> dict[str, LlamaServer]:
    """The models of which single mode has one up at a time; in dual mode none."""
    return {
        name: service
        for name, service in profile.service.items()
        if profile.mode == "single" and isinstance(service, LlamaServer) and not service.pinned
    }


def active(profile: Profile) -> str:
    """Which of them that is; empty where there is none."""
    models = takes_turns(profile)
    first = max(models, key=lambda name: models[name].priority, default="")
    return profile.active or first if models else ""


def away(profile: Profile) -> frozenset[str]:
    """The others, of which each would take its place."""
    return frozenset(takes_turns(profile).keys() - {active(profile)})


def swappable(profile: Profile) -> frozenset[str]:
    """Those of them that a request swaps in: all, once one of these models starts on demand."""
    models = takes_turns(profile).values()
    may_swap = any(service.start == "on-demand" for service in models)
    return away(profile) if may_swap else frozenset()


def on_demand(profile: Profile) -> frozenset[str]:
    """The services that a request starts: for the first time, or when they were idle."""
    return frozenset(
        name
        for name, service in profile.service.items()
        if (service.start == "on-demand" or service.ttl_s) and name not in away(profile)
    )


def ttls_s(profile: Profile) -> dict[str, float]:
    """After how long without a request a service is unloaded; of those that are."""
    return {name: service.ttl_s for name, service in profile.service.items() if service.ttl_s}


def warm(profile: Profile) -> frozenset[str]:
    """The services whose prompt caches are kept while they are away."""
    return frozenset(
        name
        for name, service in profile.service.items()
        if isinstance(service, LlamaServer) and service.warm_for_s
    )


def _ports(service: Service) -> tuple[int, ...]:
    if isinstance(service, Qdrant):
        return service.port, service.grpc_port
    return () if service.port is None else (service.port,)


def _policy(service: Service) -> Policy:
    return Policy(
        restart=service.restart,
        stall_timeout_s=service.stall_timeout_s,
        start_timeout_s=service.start_timeout_s,
        drain_timeout_s=service.drain_timeout_s,
        grace_period_s=service.grace_period_s,
    )


def _unit(
    name: str,
    service: Service,
    port: int | None,
    paths: Paths,
    environ: Mapping[str, str],
    *,
    is_gpu_busy: Callable[[], bool | None],
) -> Unit:
    def launch(grant: Grant = UNPLANNED, /) -> Launch:
        match service:
            case LlamaServer():
                binary = binaries.llama_server(service.binary, environ)
                known = engine.look(binary, paths.engines)
                flags = None if known is None else known.flags
                made = llama_server.launch(
                    service,
                    name=name,
                    binary=binary,
                    port=port or 0,
                    options=grant.placement.options if grant.placement else None,
                    device=grant.device,
                    flags=flags,
                    slot_directory=_slot_directory(paths.slots) if service.warm_for_s else None,
                )
                slots = made.slots and replace(made.slots, files=_read_by(service, binary))
                return replace(made, grant=written(grant), slots=slots)
            case Qdrant():
                binary = binaries.qdrant(service.binary, environ)
                storage = _created(paths.state / service.storage)
                return qdrant.launch(service, binary=binary, storage=storage)
            case Command():
                return command.launch(service)

    asking = _Asking(service, paths, environ) if isinstance(service, LlamaServer) else None
    unit = Unit(
        name=name,
        kind=str(service.__struct_config__.tag),
        launch=launch,
        log=paths.service_log(name),
        mark=f"{home_mark(paths)}{name}:",
        policy=_policy(service),
        readiness=service.readiness,
        liveness=service.liveness,
        depends_on=service.depends_on,
        port=port,
        prepare=asking,
        model=Path(service.model).name if isinstance(service, LlamaServer) else None,
        gpu_layers=_gpu_layers(service),
        rank=rank(name, service.priority, pinned=service.pinned),
    )
    if asking is not None:
        unit = replace(unit, is_prepared=asking.is_done)
    return replace(unit, is_gpu_busy=is_gpu_busy) if unit.uses_card else unit


def _gpu_layers(service: Service) -> int | str | None:
    """What the profile says; 0 also where `args` keep it off the card."""
    if not isinstance(service, LlamaServer):
        return None
    return service.gpu_layers if llama_options.asked(service, 1).gpu_layers else 0


class _Asking:
    """Asks the engine of a service what it knows; one that is installed later is asked anew."""

    def __init__(self, service: LlamaServer, paths: Paths, environ: Mapping[str, str]) -> None:
        self._service = service
        self._paths = paths
        self._environ = environ
        self._asked = ""

    def __call__(self) -> None:
        binary = self._binary()
        self._asked = engine.identity(binary)  # however it answers: one that hangs is asked once
        engine.learn(binary, self._paths.engines)

    def is_done(self) -> bool:
        try:
            return engine.identity(self._binary()) == self._asked
        except LaunchError:
            return True  # there is nobody to ask; the launch says so

    def _binary(self) -> str:
        return binaries.llama_server(self._service.binary, self._environ)


def _slot_directory(directory: Path) -> Path | None:
    """Made anew where somebody removed it: a server does not start without. None: it cannot be."""
    try:
        make_private(directory)
    except LlmsupError as error:
        log.warning("prompt caches are not kept: %s", error.message)
        return None
    return directory


def _read_by(service: LlamaServer, binary: str) -> tuple[Path, ...]:
    """All files that make a llama-server what it is."""
    models = [Path("/", each) for each in (service.model, *llama_options.extra_files(service))]
    return (*engine.files_of(binary), *(part for model in models for part in parts_of(model)))


def _created(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"cannot create {directory}: {error.strerror}") from None
    return directory


def _gateway(profile: Profile, paths: Paths, environ: Mapping[str, str]) -> Unit:
    listen = Endpoint(*parse_listen(profile.gateway.listen))
    may_hold = profile.gateway.hold_streams == "auto"

    def binary() -> str:
        return binaries.envoy(profile.gateway.envoy, environ)

    def launch(_grant: Grant = UNPLANNED, /) -> Launch:
        program = binary()
        holds = may_hold and envoy_hold.is_known_to_hold(program, paths.hold_answer)
        made = envoy.launch(program, paths.gateway, listen, holds=holds)
        version = str(fingerprint(Path(program)))
        return replace(made, configuration=f"{made.configuration} {version}")

    def prepare() -> None:
        if may_hold:
            envoy_hold.learn(binary(), paths.hold_answer)

    return Unit(
        name=GATEWAY,
        kind="envoy",
        launch=launch,
        log=paths.service_log(GATEWAY),
        mark=f"{home_mark(paths)}{GATEWAY}:",
        policy=Policy(restart=GATEWAY_RESTART, drain_timeout_s=profile.gateway.drain_timeout_s),
        liveness=Liveness(timeout_s=profile.gateway.liveness_timeout_s),
        port=listen.port,
        successor=partial(envoy.successor, drain_timeout_s=profile.gateway.drain_timeout_s),
        prepare=prepare,
    )
