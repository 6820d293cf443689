"""What an estimate is made of, in parts that a person understands. They add up to it."""

from collections.abc import Iterator
from itertools import groupby

from llmsup.core.estimate.bound import largest_host_weight, largest_part
from llmsup.core.estimate.effective import Effective
from llmsup.core.estimate.kv_cache import cache_of_block
from llmsup.core.estimate.weights import (
    Place,
    expert_is_on_card,
    experts_of_block,
    output_weights,
    weights_of_block,
)
from llmsup.core.ggml import TYPES
from llmsup.core.shape import Block, ModelShape
from llmsup.core.sizes import Item


def items(shape: ModelShape, options: Effective, outer: Place, compute: Place) -> tuple[Item, ...]:
    """The parts, weights first. `outer`: the tensors that belong to no layer."""
    output = output_weights(shape, options)
    rest = Place(outer.device_bytes - output.device_bytes, outer.host_bytes - output.host_bytes)
    parts = [
        _item("output layer", output),
        *_layers(shape, options),
        *_experts(shape, options),
        _item("input embedding and what is shared", rest),
        *_caches(shape, options),
        *_computing(shape, options, compute),
    ]
    return tuple(part for part in parts if part.device_bytes or part.host_bytes)


def _item(what: str, place: Place) -> Item:
    return Item(what, place.device_bytes, place.host_bytes)


def _runs(count: int, key: list[object]) -> Iterator[tuple[int, int]]:
    """The first and last number of each run of equal keys."""
    for _, run in groupby(range(count), key=key.__getitem__):
        numbers = list(run)
        yield numbers[0], numbers[-1]


def _named(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _layers(shape: ModelShape, options: Effective) -> Iterator[Item]:
    keys: list[object] = [options.on_card(number) for number in range(shape.trunk)]
    for first, last in _runs(shape.trunk, keys):
        places = [weights_of_block(shape, number, options) for number in range(first, last + 1)]
        yield _item(_named(first, last), _sum(places))


def _experts(shape: ModelShape, options: Effective) -> Iterator[Item]:
    if not shape.has_experts:
        return
    keys: list[object] = [expert_is_on_card(number, options) for number in range(shape.trunk)]
    for first, last in _runs(shape.trunk, keys):
        places = [experts_of_block(shape, number, options) for number in range(first, last + 1)]
        yield _item(f"experts of {_named(first, last)}", _sum(places))


def _sum(places: list[Place]) -> Place:
    return Place(sum(each.device_bytes for each in places), sum(each.host_bytes for each in places))


def _caches(shape: ModelShape, options: Effective) -> Iterator[Item]:
    kinds: dict[str, list[int]] = {}
    for number, block in enumerate(shape.blocks[: shape.trunk]):
        size = cache_of_block(shape, block, options)
        if not size:
            continue
        entry = kinds.setdefault(_cache_kind(block, options), [0, 0, 0])
        entry[0] += 1
        entry[1 if options.on_card(number) and options.kv_offload else 2] += size
    for kind, (count, device, host) in kinds.items():
        layers = "1 layer" if count == 1 else f"{count} layers"
        yield Item(kind.format(layers=layers), device, host)


def _cache_kind(block: Block, options: Effective) -> str:
    if not block.has_cache:
        return "state of {layers}"
    cells = options.window_cells(block.window) * options.streams
    names = list(
        dict.fromkeys(TYPES[each].name.lower() for each in (options.k_type, options.v_type))
    )
    window = f", a window of {block.window}" if block.window else ""
    state = ", and a state" if block.is_recurrent else ""
    return f"KV cache of {{layers}} × {cells} tokens, {'/'.join(names)}{window}{state}"


def _computing(shape: ModelShape, options: Effective, compute: Place) -> Iterator[Item]:
    """The compute buffers. What is copied from the host is named by itself."""
    size = compute.device_bytes
    staged = largest_host_weight(shape, options)
    if 0 < staged < size:
        yield Item("copy of the largest tensor on the host", staged)
        size -= staged
    part = largest_part(shape, options)
    yield Item(f"computing: {part} of {options.tokens} tokens", size, compute.host_bytes)
