"""What one llama-server takes: weights, cache and compute buffer, on the card and on the host."""

from functools import lru_cache

from llmsup.core.estimate.closed_form import bound
from llmsup.core.estimate.compute import compute_bytes
from llmsup.core.estimate.effective import Effective, effective
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


@lru_cache(maxsize=4096)
def estimate(shape: ModelShape, options: Options) -> Estimate:
    """What a process with a card takes. `gpu_layers` of 0 is `-ngl 0` here: it still computes."""
    chosen = effective(shape, options)
    weights = _weights(shape, chosen)
    cache = _cache(shape, chosen)
    known = shape.is_known
    compute, on_host = compute_bytes(shape, chosen) if known else (bound(shape, chosen), 0)
    return Estimate(
        device=Sizes(weights.device_bytes, cache.device_bytes, compute),
        host=Sizes(weights.host_bytes, cache.host_bytes, on_host),
        basis=Basis.GRAPH if known else Basis.BOUND,
    )


def off_card(shape: ModelShape, options: Options) -> Estimate:
    """What a process takes that was told of no card (`--device none`): all on the host."""
    chosen = effective(shape, options)
    weights, cache = _weights(shape, chosen), _cache(shape, chosen)
    host = Sizes(
        weights.device_bytes + weights.host_bytes, cache.device_bytes + cache.host_bytes, 0
    )
    return Estimate(device=Sizes(), host=host)


@lru_cache(maxsize=16384)
def buffers_at_least(shape: ModelShape, options: Options) -> int:
    """Weights and cache on the card: what it takes at the very least. Bytes."""
    chosen = effective(shape, options)
    return _weights(shape, chosen).device_bytes + _cache(shape, chosen).device_bytes


def _weights(shape: ModelShape, options: Effective) -> Place:
    places = [outer_weights(shape, options)]
    for number in range(shape.trunk):
        places.append(weights_of_block(shape, number, options))
        places.append(experts_of_block(shape, number, options))
    return _sum(places)


def _cache(shape: ModelShape, options: Effective) -> Place:
    device = host = 0
    for number, block in enumerate(shape.blocks[: shape.trunk]):
        size = cache_of_block(shape, block, options)
        if options.on_card(number) and options.kv_offload:
            device += size
        else:
            host += size
    return Place(device, host)


def _sum(places: list[Place]) -> Place:
    return Place(sum(each.device_bytes for each in places), sum(each.host_bytes for each in places))
