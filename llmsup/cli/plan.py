"""`llmsup plan`: what would be on the card, without starting anything."""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from llmsup.cli import plan_view, terminal
from llmsup.config.load import Loaded, look
from llmsup.config.paths import Paths, paths
from llmsup.config.schema import LlamaServer
from llmsup.control.client import Client
from llmsup.control.wire import Status
from llmsup.core.device import Device, Reading
from llmsup.core.plan import Placement, Plan
from llmsup.errors import ConfigError, LlmsupError, ModelFileError, UsageError
from llmsup.host import choices, gguf, ledger
from llmsup.host.nvml import Nvml
from llmsup.sizing import Sizing
from llmsup.units import wanted

MIB = 2**20
WHAT_IF_NAME = "a card"


def plan(
    source: str | None,
    overrides: Sequence[str],
    *,
    total_bytes: int | None = None,
    free_bytes: int | None = None,
    as_json: bool = False,
    is_verbose: bool = False,
) -> None:
    """Show the plan of a profile. `total_bytes` and `free_bytes` are of a card that is supposed.

    Raises LlmsupError where it does not fit or a model file cannot be read, ConfigError where the
    profile has other problems, UsageError where the card cannot be.
    """
    home = paths()
    status = _status(home)
    loaded, missing = _looked(source, overrides, home, status)
    services = wanted(loaded.profile)
    learned = ledger.peek(home.ledger)
    sizing = Sizing(loaded.profile, os.environ, lambda: learned, home.engines)
    flaws = _flaws(sizing, services, missing)
    if missing is not None and len(flaws) == len(sizing.models(services)):
        raise missing
    nvml = Nvml(loaded.profile.gpu.device)
    reading = supposed(lambda: asyncio.run(nvml.read()), total_bytes, free_bytes)
    is_real = total_bytes is None and free_bytes is None and isinstance(reading, Device)
    ours_bytes = _ours_bytes(status) if is_real else 0
    made = sizing.plan(reading, services, coming_back_bytes=ours_bytes)
    for word in _words(loaded, services, status, ours_bytes):
        terminal.say(word)
    if as_json:
        terminal.show_json(document(made))
    elif made.placements:
        _show(made, is_verbose=is_verbose)
    errors = [made.refusal, *flaws.values()]
    if any(errors):
        hint = made.hint if made.refusal else _hint(sizing.flaws(services), missing)
        raise LlmsupError("\n".join(filter(None, errors)), hint=hint)


def supposed(
    read: Callable[[], Reading], total_bytes: int | None, free_bytes: int | None
) -> Reading:
    """The card as `read` finds it, or the one that is asked about. Raises UsageError."""
    for option, size_bytes in (("--total", total_bytes), ("--free", free_bytes)):
        if size_bytes is not None and size_bytes <= 0:
            raise UsageError(f"{option} is not above zero", hint="llmsup plan --total 6141")
    if total_bytes is not None:
        card: Reading = Device(0, "", WHAT_IF_NAME, "", total_bytes, total_bytes, 0)
    else:
        card = read()
    if free_bytes is None:
        return card
    if not isinstance(card, Device):
        raise UsageError(
            f"--free is of a card, and there is none: {card.reason}",
            hint=f"say how large it is: --total 6141 --free {free_bytes // MIB}",
        )
    if free_bytes > card.total_bytes:
        raise UsageError(
            f"--free {free_bytes // MIB} is more than the card has: {card.total_bytes // MIB} MiB",
            hint="llmsup plan --total 6141 --free 5800",
        )
    return replace(card, free_bytes=free_bytes, used_bytes=card.total_bytes - free_bytes)


def document(plan: Plan) -> dict[str, object]:
    """`plan --json`; a public contract."""
    budget = plan.budget
    device = budget and {
        "name": budget.device_name,
        "total_bytes": budget.total_bytes,
        "free_bytes": budget.free_bytes,
        "headroom_bytes": budget.headroom_bytes,
        "ceiling_bytes": budget.ceiling_bytes,
    }
    return {
        "device": device,
        "fits": not plan.refusal,
        "services": [_service(each) for each in plan.placements],
        "left_bytes": plan.left_bytes,
    }


def _service(each: Placement) -> dict[str, object]:
    options, price = each.options, each.price
    sizes = price.estimate.device
    return {
        "service": each.service,
        "model": each.model,
        "gpu_layers": options.gpu_layers,
        "layers": each.layers,
        "n_cpu_moe": options.n_cpu_moe,
        "ctx_size": options.ctx_size,
        "parallel": options.parallel,
        "kv_unified": options.kv_unified,
        "cache_type_k": options.cache_type_k,
        "cache_type_v": options.cache_type_v,
        "batch": options.batch,
        "ubatch": options.ubatch,
        "flash_attn": options.flash_attn,
        "weights_bytes": sizes.weights_bytes,
        "kv_cache_bytes": sizes.kv_cache_bytes,
        "compute_bytes": sizes.compute_bytes,
        "overhead_bytes": price.overhead_bytes,
        "total_bytes": price.device_bytes,
        "host_bytes": price.estimate.host.total_bytes,
        "reason": each.reason,
    }


def _status(home: Paths) -> Status | None:
    """The stack that is up; None where there is none, or none that can be understood."""
    try:
        return Client(home).status()
    except LlmsupError:
        return None


def _looked(
    source: str | None, overrides: Sequence[str], home: Paths, status: Status | None
) -> tuple[Loaded, ConfigError | None]:
    """The profile, by default as it is up, and what is wrong with its model files."""
    if source is None and status is not None:
        source = status["daemon"]["profile_path"]
        overrides = (*status["daemon"]["overrides"], *overrides)
    return look(
        source or choices.profile_meant(home, os.environ),
        environ=os.environ,
        overrides=overrides,
        config_dir=home.config,
        choices=choices.peek(home.choices).usable,
    )


def _flaws(sizing: Sizing, services: Sequence[str], missing: ConfigError | None) -> dict[str, str]:
    """What is wrong with the model files of services, in the words of who found it first."""
    problems = () if missing is None else missing.problems
    told = {problem.key: str(problem) for problem in problems}
    found = {name: told.get(f"service.{name}.model", "") for name in sizing.models(services)}
    for name, error in sizing.flaws(services).items():
        found[name] = found[name] or f"{name}: {error.message}"
    return {name: words for name, words in found.items() if words}


def _hint(flaws: Mapping[str, ModelFileError], missing: ConfigError | None) -> str:
    if missing is not None:
        return missing.hint
    return next((gguf.HINTS[each.flaw] for each in flaws.values() if each.flaw in gguf.HINTS), "")


def _ours_bytes(status: Status | None) -> int:
    """What the services of the stack that is up have on the card, as far as it was measured."""
    infos = [] if status is None else status["services"]
    return sum(info["measured_bytes"] or 0 for info in infos if info["pid"] is not None)


def _words(
    loaded: Loaded, services: Sequence[str], status: Status | None, ours_bytes: int
) -> Iterator[str]:
    """What has to be known to read the plan."""
    profile = loaded.profile
    models = [name for name, each in profile.service.items() if isinstance(each, LlamaServer)]
    if not models:
        yield f"{loaded.name} has no models: there is nothing to plan"
    if ours_bytes and status is not None:
        up = status["daemon"]["profile"]
        yield f"{up} is up and holds {ours_bytes // MIB} MiB: planned as if that were free"
    if idle := [name for name in models if name not in services]:
        yield f"single mode: without {', '.join(idle)}; llmsup plan --set active={idle[0]}"


def _show(plan: Plan, *, is_verbose: bool) -> None:
    text = plan_view.text(
        plan,
        width=terminal.width(sys.stdout),
        colour=terminal.has_colour(sys.stdout),
        is_verbose=is_verbose,
    )
    terminal.show(text if terminal.is_unicode(sys.stdout) else plan_view.in_ascii(text))
