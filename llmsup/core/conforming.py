"""Whether a process was started with options that a plan could give its service now. Pure."""

from dataclasses import replace

from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Demand, Knob

_CHEAPER_CACHE = "q8_0"


def conforms(options: Options, demand: Demand) -> bool:
    """Whether what differs from the best is what a plan may choose, or take away."""
    best = demand.asked
    as_best = replace(
        options,
        gpu_layers=best.gpu_layers if _may_choose_layers(options, demand) else options.gpu_layers,
        n_cpu_moe=best.n_cpu_moe if _may_choose_experts(options, demand) else options.n_cpu_moe,
    )
    if Degrade.CACHE_TYPE in demand.degrade:
        as_best = replace(
            as_best,
            cache_type_k=_undegraded(options.cache_type_k, best.cache_type_k),
            cache_type_v=_undegraded(options.cache_type_v, best.cache_type_v),
        )
    if Degrade.UBATCH in demand.degrade and options.ubatch <= best.ubatch:
        as_best = replace(as_best, ubatch=best.ubatch, batch=best.batch)
    if Degrade.CTX_SIZE in demand.degrade:
        is_within = demand.ctx_size_min <= options.ctx_size <= best.ctx_size
        as_best = replace(as_best, ctx_size=best.ctx_size if is_within else options.ctx_size)
    return as_best == best


def _may_choose_layers(options: Options, demand: Demand) -> bool:
    """Pinned ones have all, or, without a card, nothing."""
    if Knob.GPU_LAYERS not in demand.knobs:
        return False
    least = demand.layers if demand.pinned else 0
    return options.gpu_layers == 0 or least <= options.gpu_layers <= demand.layers


def _may_choose_experts(options: Options, demand: Demand) -> bool:
    if demand.pinned:
        return False
    return Knob.N_CPU_MOE in demand.knobs and 0 <= options.n_cpu_moe <= demand.layers


def _undegraded(given: str, best: str) -> str:
    return best if given == _CHEAPER_CACHE and best == "f16" else given
