"""What must hold between the values of a profile. Pure: files are `resolve`'s business."""

from collections.abc import Iterator, Set
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from llmsup.config.flags import owned_flags
from llmsup.config.listen import is_loopback, parse_listen
from llmsup.config.schema import (
    PLAIN_CACHE_TYPES,
    Command,
    Gateway,
    LlamaServer,
    Profile,
    Qdrant,
    Service,
)
from llmsup.config.units import duration
from llmsup.config.wording import Key, choices, named, quoted, suggestion

Finding = tuple[Key, str]
"""A problem: where it stands, and what would be valid there."""

LIVENESS_MIN_S = 2.0
"""Shorter than this, one look that came late would be a verdict."""

RESERVED = ("gateway", "daemon", "all")
"""Names that a service cannot have: commands and logs use them for something else."""


def findings(profile: Profile, declared: Set[str]) -> Iterator[Finding]:
    """Everything in `profile` that does not fit together.

    `declared`: the names of all services written down, those that could not be decoded included.
    """
    if not declared:
        yield ("service",), "no services; add a table [service.NAME] with a kind"
    yield from _mode(profile)
    yield from _gateway(profile.gateway)
    for name, service in profile.service.items():
        yield from _service(name, service)
    yield from _ports(profile)
    yield from _dependencies(profile, declared)
    yield from _on_demand(profile)
    yield from _routes(profile, declared)
    yield from _model_names(profile)


def _mode(profile: Profile) -> Iterator[Finding]:
    if profile.mode == "dual":
        if profile.active is not None:
            yield ("active",), 'only with mode = "single"; in mode "dual" all models are up'
        return
    candidates = [
        name
        for name, service in profile.service.items()
        if isinstance(service, LlamaServer) and not service.pinned
    ]
    if profile.active is not None and profile.active not in candidates:
        valid = f"expected {choices(candidates)}" if candidates else "this profile has none"
        yield ("active",), f"{quoted(profile.active)} is no unpinned llama-server; {valid}"
        return
    for name, service in profile.service.items():
        for position, needed in enumerate(service.depends_on):
            if needed in candidates:
                message = f"{quoted(needed)} may be down in single mode; pin it, or do without"
                yield ("service", name, "depends_on", position), message


def _on_demand(profile: Profile) -> Iterator[Finding]:
    """A service that requests start needs some that can reach it, and nobody who waits for it."""
    routed = {name for route in profile.route.values() for name in route.services}
    loaded = {}
    for name, service in profile.service.items():
        key = "start" if service.start == "on-demand" else "ttl"
        if key == "ttl" and not service.ttl_s:
            continue
        loaded[name] = key
        if not isinstance(service, LlamaServer) and name not in routed:
            yield ("service", name, key), "no request could load it; name it in a route, or drop it"
    for name, service in profile.service.items():
        for position, needed in enumerate(service.depends_on):
            if needed in loaded:
                message = f"{quoted(needed)} may be down until a request loads it"
                finding = f"{message}; drop its {loaded[needed]}, or do without"
                yield ("service", name, "depends_on", position), finding


def _liveness(timeout_s: float, *key: str) -> Iterator[Finding]:
    if 0 < timeout_s < LIVENESS_MIN_S:
        message = f'expected {duration(LIVENESS_MIN_S)} or more, or "0s" for never'
        yield key, f"{message}; got {duration(timeout_s)}"


def _gateway(gateway: Gateway) -> Iterator[Finding]:
    yield from _liveness(gateway.liveness_timeout_s, "gateway", "liveness_timeout")
    said_again = gateway.listen_without_api_keys
    if gateway.api_keys_file is not None and said_again is not None:
        message = "contradicts gateway.api_keys_file; keep one of them"
        yield ("gateway", "listen_without_api_keys"), message
    elif said_again is not None and said_again != gateway.listen:
        message = f"expected the address of gateway.listen again, {quoted(gateway.listen)}"
        yield ("gateway", "listen_without_api_keys"), f"{message}; got {quoted(said_again)}"
    try:
        host, _ = parse_listen(gateway.listen)
    except ValueError as error:
        yield ("gateway", "listen"), f"{error}, got {quoted(gateway.listen)}"
        return
    if not is_loopback(host) and gateway.api_keys_file is None and said_again is None:
        yield (
            ("gateway", "listen"),
            f"{named(gateway.listen)} lets other machines in: set gateway.api_keys_file, or, to "
            f"serve anyone who can reach it, say the address twice: listen_without_api_keys = "
            f"{quoted(gateway.listen)}",
        )


def _service(name: str, service: Service) -> Iterator[Finding]:
    key = ("service", name)
    if name in RESERVED:
        yield key, f"the name {quoted(name)} is reserved; choose another"
    if service.readiness.http_get is not None and service.readiness.tcp:
        yield (*key, "readiness"), "expected http_get or tcp, got both"
    restart = service.restart
    if restart.backoff_s > restart.max_backoff_s:
        message = f"longer than max_backoff ({restart.max_backoff_s:g}s)"
        yield (*key, "restart", "backoff"), message
    yield from _liveness(service.liveness.timeout_s, *key, "liveness", "timeout")
    match service:
        case LlamaServer():
            for position, message in owned_flags(service.args):
                yield (*key, "args", position), message
            for word, message in _llama_server(service):
                yield (*key, word), message
        case Command(port=None):
            for way in ("http_get", "tcp"):
                if getattr(service.readiness, way):
                    yield (*key, "readiness", way), "there is no port to probe; set port as well"


def _llama_server(service: LlamaServer) -> Iterator[tuple[str, str]]:
    degrade, ctx_size_min = service.degrade, service.ctx_size_min
    if service.flash_attn == "off":
        needs = "a quantised V cache needs flash attention"
        if service.cache_type_v not in PLAIN_CACHE_TYPES:
            yield "cache_type_v", f'{needs}; drop flash_attn = "off" or take "f16"'
        elif "cache_type" in degrade:
            yield "degrade", f'{needs}; drop flash_attn = "off" or "cache_type"'
    if degrade and service.gpu_layers != "auto":
        yield "degrade", 'only with gpu_layers = "auto"; a number of layers is taken as it is'
    elif degrade and service.pinned:
        yield "degrade", "contradicts pinned = true: what is pinned is never made smaller"
    if len(set(degrade)) < len(degrade):
        yield "degrade", "a word is there twice"
    if "ctx_size" in degrade and ctx_size_min is None:
        yield "degrade", '"ctx_size" needs ctx_size_min, the fewest tokens that are of use'
    if ctx_size_min is not None and "ctx_size" not in degrade:
        yield "ctx_size_min", 'only with "ctx_size" in degrade'
    elif ctx_size_min is not None and ctx_size_min > service.ctx_size:
        yield "ctx_size_min", f"more than ctx_size ({service.ctx_size})"


def _ports(profile: Profile) -> Iterator[Finding]:
    owners: dict[int, str] = {}
    for key, port in _claims(profile):
        owner = owners.setdefault(port, ".".join(key))
        if owner != ".".join(key):
            yield key, f"{port} is the port of {owner} already; each needs its own"


def _claims(profile: Profile) -> Iterator[tuple[tuple[str, ...], int]]:
    with suppress(ValueError):  # reported by _gateway
        yield ("gateway", "listen"), parse_listen(profile.gateway.listen)[1]
    for name, service in profile.service.items():
        if service.port is not None:
            yield ("service", name, "port"), service.port
        if isinstance(service, Qdrant):
            yield ("service", name, "grpc_port"), service.grpc_port


def _dependencies(profile: Profile, declared: Set[str]) -> Iterator[Finding]:
    needs: dict[str, list[str]] = {}
    for name, service in profile.service.items():
        needs[name] = [needed for needed in service.depends_on if needed in declared]
        for position, needed in enumerate(service.depends_on):
            if needed not in declared:
                message = f"no service {quoted(needed)}; {suggestion(needed, declared)}"
                yield ("service", name, "depends_on", position), message
    while cycle := _cycle(needs):
        yield (
            ("service", cycle[0], "depends_on"),
            f"a cycle, nothing of it could ever start: {' -> '.join(cycle)}",
        )
        for name, needed in pairwise(cycle):
            needs[name] = [other for other in needs[name] if other != needed]


def _cycle(needs: dict[str, list[str]]) -> list[str]:
    """One cycle, from its first name in alphabetical order back to it; empty if there is none."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        ring = list(reversed(error.args[1]))[1:]
        start = ring.index(min(ring))
        return [*ring[start:], *ring[: start + 1]]
    return []


def _routes(profile: Profile, declared: Set[str]) -> Iterator[Finding]:
    for route_name, route in profile.route.items():
        key = ("route", route_name, "services")
        for position, name in enumerate(route.services):
            if name not in declared:
                yield (*key, position), f"no service {quoted(name)}; {suggestion(name, declared)}"
            elif name in route.services[:position]:
                yield (*key, position), f"{quoted(name)} is named twice"
            elif isinstance(service := profile.service.get(name), Qdrant):
                yield (*key, position), f"{quoted(name)} is a vector store and answers no models"
            elif isinstance(service, Command) and service.port is None:
                yield (*key, position), f"{quoted(name)} has no port; set service.{name}.port"
        first = profile.service.get(route.services[0]) if route.services else None
        if first is not None and first.pinned and len(route.services) > 1:
            message = f"{quoted(route.services[0])} is pinned and never failed over"
            yield key, f"{message}; keep it alone in the route, or unpin it"


def _model_names(profile: Profile) -> Iterator[Finding]:
    owners = {name: f"route {quoted(name)}" for name in profile.route}
    for route_name, route in profile.route.items():
        for position, alias in enumerate(route.aliases):
            if alias in owners:
                message = f"{quoted(alias)} is taken by {owners[alias]}; a model name has one route"
                yield ("route", route_name, "aliases", position), message
            owners.setdefault(alias, f"an alias of route {quoted(route_name)}")
