"""What one llama-server takes: weights, cache and compute buffer, on the card and on the host."""

from dataclasses import replace
from functools import lru_cache

from llmsup.core.estimate.bound import upper_bound
from llmsup.core.estimate.compute import compute_bytes
from llmsup.core.estimate.effective import Effective, effective
from llmsup.core.estimate.explanation import items
from llmsup.core.estimate.kv_cache import cache_of_block
from llmsup.core.estimate.pool import pool_bytes
from llmsup.core.estimate.weights import (
    Place,
    experts_of_block,
    outer_weights,
    weights_of_block,
)
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
    device = _compute(shape, replace(chosen, op_offload=False, kv_offload=False))
    compute = Place(0, device.device_bytes + device.host_bytes)
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
    for number in range(shape.trunk):
        for place in (
            weights_of_block(shape, number, options),
            experts_of_block(shape, number, options),
        ):
            device += place.device_bytes
            host += place.host_bytes
    return Place(device, host)


def _cache(shape: ModelShape, options: Effective) -> Place:
    device = host = 0
    for number, block in enumerate(shape.blocks[: shape.trunk]):
        size = cache_of_block(shape, block, options)
        if options.on_card(number) and options.kv_offload:
            device += size
        else:
            host += size
    return Place(device, host)
