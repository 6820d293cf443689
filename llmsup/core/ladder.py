"""What a demand leaves to choose: how much of the model is on the card, and what is given for it.

A *step* is a number of layers and of layers whose experts stay on the host. What every token goes
through comes first: all layers with all experts on the host, then the experts, layer by layer.
A *rung* is what is taken from the service: nothing, then what `Demand.degrade` names, each on top
of those before it.
"""

from collections.abc import Iterator
from dataclasses import replace

from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Demand, Knob

_UBATCHES = (256, 128)
_WIDE = frozenset({"f32", "f16", "bf16"})

Step = tuple[int, int]
"""gpu_layers and n_cpu_moe."""


def is_required(demand: Demand) -> bool:
    """Whether a plan without it on the card is none: it has a number of layers, or is pinned."""
    return demand.pinned or Knob.GPU_LAYERS not in demand.knobs


def steps(demand: Demand) -> tuple[Step, ...]:
    """The steps, the least on the card first."""
    asked = demand.asked
    best = (asked.gpu_layers, asked.n_cpu_moe)
    if demand.pinned or not demand.knobs or (is_required(demand) and asked.gpu_layers == 0):
        return (best,)
    experts: tuple[int, ...] = (asked.n_cpu_moe,)
    if Knob.N_CPU_MOE in demand.knobs and demand.has_experts:
        experts = tuple(range(max(demand.layers - 1, asked.n_cpu_moe), asked.n_cpu_moe - 1, -1))
    if Knob.GPU_LAYERS not in demand.knobs:
        return tuple((asked.gpu_layers, each) for each in experts)
    fewer = tuple((layers, experts[0]) for layers in range(1, demand.layers))
    return ((0, 0), *fewer, *((demand.layers, each) for each in experts))


def degraded(options: Options, what: Degrade, ctx_size_min: int) -> Iterator[Options]:
    """What may be taken of one kind, the mildest first; nothing where there is no more to take."""
    match what:
        case Degrade.CACHE_TYPE if options.flash_attn != "off":  # else the engine refuses q8_0 V
            narrow = replace(
                options,
                cache_type_k=_narrow(options.cache_type_k),
                cache_type_v=_narrow(options.cache_type_v),
            )
            if narrow != options:
                yield narrow
        case Degrade.UBATCH if not options.pooled:  # there it is the longest text as well
            for ubatch in _UBATCHES:
                if ubatch < options.ubatch:
                    yield replace(options, ubatch=ubatch)
        case Degrade.CTX_SIZE if ctx_size_min > 0:
            ctx_size = options.ctx_size
            while ctx_size > ctx_size_min:
                ctx_size = max(ctx_size // 2, ctx_size_min)
                yield replace(options, ctx_size=ctx_size)
        case _:
            pass


def _narrow(cache_type: str) -> str:
    return "q8_0" if cache_type in _WIDE else cache_type
