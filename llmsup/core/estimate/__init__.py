"""What one llama-server takes: weights, cache and compute buffer, on the card and on the host."""

from dataclasses import replace
from functools import lru_cache

from llmsup.core.estimate.bound import upper_bound
from llmsup.core.estimate.compute import compute_bytes
from llmsup.core.estimate.effective import Effective, effective
from llmsup.core.estimate.explanation import items
from llmsup.core.estimate.kv_cache import cache_of_block
from llmsup.core.estimate.pool import pool_bytes
from llmsup.core.estimate.weights import Place, expert_is_on_card, outer_weights
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape
from llmsup.core.sizes import Basis, Estimate, Sizes

__all__ = ["buffers_at_least", "estimate", "off_card", "pool_bytes"]


_UNKNOWN = "the engine's graph of {name} is not known here: its compute buffer is an upper bound"


@lru_cache(maxsize=4096)
def estimate(shape: ModelShape, options: Options) -> Estimate:
    """What a process with a card takes. `gpu_layers` of 0 is `-ngl 0` here: it still computes."""
    chosen = effective(shape, options)
    outer = outer_weights(shape, chosen)
    weights = _layers(shape, chosen, outer)
    cache = _cache(shape, chosen)
    compute = _compute(shape, chosen)
    return _estimate(shape, chosen, (outer, weights, cache, compute))


@lru_cache(maxsize=256)
def off_card(shape: ModelShape, options: Options) -> Estimate:
    """What a process takes that was told of no card (`--device none`): all on the host."""
    chosen = replace(effective(shape, options), has_output=False, first_block=shape.layers)
    outer = outer_weights(shape, chosen)
    weights = _layers(shape, chosen, outer)
    # One side has it all: as much as the card would, were all of it there.
    there = replace(chosen, has_output=True, first_block=0, n_cpu_moe=0, kv_offload=True)
    compute = Place(0, _compute(shape, there).device_bytes)
    return _estimate(shape, chosen, (outer, weights, _cache(shape, chosen), compute))


def _estimate(
    shape: ModelShape, options: Effective, places: tuple[Place, Place, Place, Place]
) -> Estimate:
    outer, weights, cache, compute = places
    device = Sizes(weights.device_bytes, cache.device_bytes, compute.device_bytes)
    host = Sizes(weights.host_bytes, cache.host_bytes, compute.host_bytes)
    name = f'"{shape.architecture}"' if shape.architecture else "a model without an architecture"
    return Estimate(
        device=device,
        host=host,
        basis=Basis.GRAPH if shape.is_known else Basis.BOUND,
        items=items(shape, options, outer, compute),
        notes=() if shape.is_known else (_UNKNOWN.format(name=name),),
    )


@lru_cache(maxsize=4096)
def _compute(shape: ModelShape, options: Effective) -> Place:
    if shape.is_known:
        return Place(*compute_bytes(shape, options))
    size = upper_bound(shape, options)
    return Place(size, size)


@lru_cache(maxsize=16384)
def buffers_at_least(shape: ModelShape, options: Options) -> int:
    """Weights and cache on the card: what it takes at the very least. Bytes."""
    chosen = effective(shape, options)
    weights = _layers(shape, chosen, outer_weights(shape, chosen))
    return weights.device_bytes + _cache(shape, chosen).device_bytes


def _layers(shape: ModelShape, options: Effective, outer: Place) -> Place:
    """All weights."""
    device, host = outer.device_bytes, outer.host_bytes
    for number, block in enumerate(shape.blocks[: shape.trunk]):
        on_device, on_host, experts_on_device, experts_on_host = block.sums
        if options.on_card(number):
            device += on_device
        else:
            host += on_host
        if expert_is_on_card(number, options):
            device += experts_on_device
        else:
            host += experts_on_host
    return Place(device, host)


def _cache(shape: ModelShape, options: Effective) -> Place:
    sizes = _caches(shape, replace(options, first_block=0, has_output=True, n_cpu_moe=0))
    first = min(options.first_block, shape.trunk) if options.kv_offload else shape.trunk
    return Place(sum(sizes[first:]), sum(sizes[:first]))


@lru_cache(maxsize=256)
def _caches(shape: ModelShape, options: Effective) -> tuple[int, ...]:
    """The cache of each layer, wherever it is."""
    return tuple(cache_of_block(shape, block, options) for block in shape.blocks[: shape.trunk])
