"""Why a service got what it got, in a sentence for a person. Pure.

Every number is one of the plan. What is taken is rounded up and what is free down, so that a
sentence that says "too much" never shows two equal numbers.
"""

from collections.abc import Mapping

from llmsup.core.choices import Choice, Choices
from llmsup.core.options import Options
from llmsup.core.plan import Demand, Knob

_MIB = 1 << 20


def taken(size_bytes: int) -> str:
    """A size that something takes, in MiB, rounded up."""
    return f"{-(-size_bytes // _MIB)} MiB"


def free(size_bytes: int) -> str:
    """A size that is free, in MiB, rounded down."""
    return f"{size_bytes // _MIB} MiB"


def reason(choices: Choices, choice: Choice, room_bytes: int, next_bytes: int | None) -> str:
    """Why `choice` of so much room; one more step takes `next_bytes`."""
    demand = choices.demand
    said = _layers(demand, choice.options)
    if Knob.GPU_LAYERS not in demand.knobs:
        said += ", as the profile says"
    elif demand.pinned:
        said += ", because it is pinned"
    given = _given(choices, choice, room_bytes)
    if given:
        said += f", with {given}"
    if choice.step == choices.top or next_bytes is None:
        return said
    more = f"{_next(choices, choice)} {taken(next_bytes)}"
    if choice.device_bytes + next_bytes <= room_bytes:
        return f"{said}: {more}, with which it ran out of memory"
    return f"{said}: {more}, {free(max(0, room_bytes - choice.device_bytes))} are left"


def without_card(demand: Demand) -> str:
    """Why a service is where it is when there is no card to plan."""
    if Knob.GPU_LAYERS in demand.knobs:
        return "on the CPU: there is no card"
    return f"{_layers(demand, demand.asked)}, as the profile says: there is no card to plan"


def refusal(
    demand: Demand, cheapest: Choice, room_bytes: int, kept_bytes: Mapping[str, int]
) -> str:
    """Why a required service has no place beside those that `kept_bytes` is kept for."""
    layers = _layers(demand, cheapest.options)
    least = "" if cheapest.options == demand.asked else "at least "
    said = f"{demand.service}: {layers} take {least}{taken(cheapest.device_bytes)}"
    if cheapest.device_bytes <= room_bytes:
        return f"{said}, with which it ran out of memory"
    after = ", ".join(f"{name} ({taken(each)})" for name, each in kept_bytes.items() if each)
    usable = f"{free(room_bytes)} are usable" + (f" after {after}" if after else "")
    return f"{said}, {usable}; {_excess(cheapest.device_bytes, room_bytes)} too much"


def refused(cheapest: Choice, room_bytes: int) -> str:
    """The same, short, for the service's own line."""
    if cheapest.device_bytes <= room_bytes:
        return "does not fit: it ran out of memory with this"
    return f"does not fit: {_excess(cheapest.device_bytes, room_bytes)} too much"


def hint(demand: Demand, instead: Choice) -> str:
    """What to write into the profile; `instead` is the best that would fit."""
    options = instead.options
    words = [f"gpu_layers = {options.gpu_layers}"]
    if options.gpu_layers and options.n_cpu_moe != demand.asked.n_cpu_moe:
        words.append(f"n_cpu_moe = {options.n_cpu_moe}")
    said = f"set {' and '.join(words)} in [service.{demand.service}]"
    if Knob.GPU_LAYERS in demand.knobs:
        return f"{said}, or pinned = false"
    return said if demand.pinned else f'{said}, or gpu_layers = "auto"'


def _excess(taken_bytes: int, free_bytes: int) -> str:
    # Of the figures as they are shown: a reader adds them up.
    return f"{-(-taken_bytes // _MIB) - free_bytes // _MIB} MiB"


def _layers(demand: Demand, options: Options) -> str:
    layers = min(options.gpu_layers, demand.layers)
    if layers <= 0:
        return "on the CPU"
    said = (
        f"all {layers} layers" if layers == demand.layers else f"{layers} of {demand.layers} layers"
    )
    if not demand.has_experts or not options.n_cpu_moe:
        return said
    if options.n_cpu_moe >= demand.layers - 1:
        return f"{said}, all experts on the CPU"
    return f"{said}, experts of the first {options.n_cpu_moe} of {demand.layers - 1} on the CPU"


def _next(choices: Choices, choice: Choice) -> str:
    if choice.options.gpu_layers == 0:
        return "the output layer alone takes"
    if choices.steps[choice.step + 1][0] == choice.options.gpu_layers:
        return "the experts of one more take"
    return "one more takes"


def _given(choices: Choices, choice: Choice, room_bytes: int) -> str:
    """What was taken from the service, and for what."""
    asked, options = choices.demand.asked, choice.options
    words = []
    if (options.cache_type_k, options.cache_type_v) != (asked.cache_type_k, asked.cache_type_v):
        words.append("q8_0 cache")
    if options.ubatch != asked.ubatch:
        words.append(f"ubatch {options.ubatch}")
    if options.ctx_size != asked.ctx_size:
        words.append(f"context of {options.ctx_size} instead of {asked.ctx_size}")
    if not words:
        return ""
    bare = choices.best_untouched(room_bytes)
    if bare is None:
        return f"{' and '.join(words)} to fit"
    layers = options.gpu_layers - bare.options.gpu_layers
    steps = layers or choice.step - bare.step
    what = "layer" if layers else "layer's experts"
    if steps != 1:
        what = "layers" if layers else "layers' experts"
    return f"{' and '.join(words)} to keep {steps} more {what}"
