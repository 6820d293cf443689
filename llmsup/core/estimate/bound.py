"""A compute buffer that is large enough whatever the order of operations, and its largest part."""

from llmsup.core.estimate.builder import OFFLOAD_MIN_ROWS
from llmsup.core.estimate.effective import Effective, heads_of
from llmsup.core.estimate.kv_cache import cache_of_block, row_bytes, widths
from llmsup.core.estimate.weights import expert_is_on_card, outer_is_on_card
from llmsup.core.ggml import TYPES
from llmsup.core.shape import Block, ModelShape, Weight

_F32, _F16_ID = 4, 1


def upper_bound(shape: ModelShape, options: Effective) -> int:
    """More than the compute buffer takes, whatever order the operations have."""
    tokens, outputs = options.tokens, options.outputs
    stream = _F32 * max(shape.embedding, 1) * tokens
    widest = 0
    for number, block in enumerate(shape.blocks[: shape.trunk]):
        # All that a layer's matrices give, alive at once, and the attention between them.
        rows = sum(_outputs_of(each, shape) for each in block.weights.values())
        state = sum(block.state) * options.slots
        # Attention twice: copies of what is on the host, and values turned where they must be.
        attended = 2 * attention_bytes(shape, number, options)
        layer = _F32 * tokens * rows + 2 * _F32 * state + attended
        widest = max(widest, layer)
    logits = _F32 * shape.vocabulary * max(outputs, 1)
    staged = 2 * largest_host_weight(shape, options)
    return widest + 6 * stream + logits + 2 * mask_bytes(shape, options) + staged


def _outputs_of(weight: Weight, shape: ModelShape) -> int:
    if len(weight.shape) < 2:
        return 0
    if weight.is_expert:
        return weight.shape[1] * max(1, shape.experts_used)
    return weight.shape[1] * (weight.shape[2] if len(weight.shape) > 2 else 1)


def feed_forward_elements(shape: ModelShape, block: Block) -> int:
    """The elements for each token that are alive at once."""
    weights = block.weights
    if (down := weights.get("ffn_down_exps.weight")) is not None and len(down.shape) > 1:
        used = max(1, shape.experts_used)
        inner, outer = down.shape[0] * used, down.shape[1] * used
        return max(3 * inner, inner + 2 * outer)
    up = weights.get("ffn_up.weight")
    inner = up.shape[1] if up is not None and len(up.shape) > 1 else 0
    return 3 * inner if "ffn_gate.weight" in weights else 2 * inner


def attention_bytes(shape: ModelShape, number: int, options: Effective) -> int:
    """What attention of a layer has alive at once, with what is copied for it."""
    block = shape.blocks[number]
    key, value, _ = heads_of(shape, number)
    cells = options.window_cells(block.window) * options.streams
    if not block.has_cache:
        cells = options.tokens
    heads, kv_heads = block.heads, block.kv_heads
    size = _F32 * options.tokens * 2 * (heads * max(key, value) + kv_heads * key)
    if options.flash_attn:
        for type_id, width in zip(
            (options.k_type, options.v_type), widths(shape, block), strict=True
        ):
            if type_id != _F16_ID:
                size += row_bytes(_F16_ID, width) * cells
    else:
        size += _F32 * options.tokens * heads * options.window_cells(block.window)
        if not options.turns_values:
            size += row_bytes(_F16_ID, value * kv_heads) * cells
    if not options.kv_offload or (block.has_cache and not options.on_card(number)):
        size += cache_of_block(shape, block, options)
    return size


def largest_part(shape: ModelShape, options: Effective) -> str:
    """What takes most of the compute buffer, in a word."""
    parts = {"logits": _F32 * shape.vocabulary * options.outputs}
    for kind in dict.fromkeys(shape.kinds[: shape.trunk]):
        number = shape.kinds.index(kind)
        fed = feed_forward_elements(shape, shape.blocks[number]) * _F32 * options.tokens
        parts["feed-forward"] = max(parts.get("feed-forward", 0), fed)
        attended = attention_bytes(shape, number, options)
        parts["attention"] = max(parts.get("attention", 0), attended)
    return max(parts, key=lambda name: parts[name])


def mask_bytes(shape: ModelShape, options: Effective) -> int:
    """Who may see whom, for each window there is."""
    width = TYPES[_F16_ID].block_bytes if options.flash_attn else _F32
    windows = {block.window for block in shape.blocks[: shape.trunk]}
    return sum(width * options.window_cells(window) * options.tokens for window in windows)


def largest_host_weight(shape: ModelShape, options: Effective) -> int:
    """The largest tensor that is copied to the card for a long prompt; 0 where none is. Bytes."""
    if not options.op_offload or options.tokens < OFFLOAD_MIN_ROWS:
        return 0
    sizes = [0]
    for number, block in enumerate(shape.blocks[: shape.trunk]):
        if not options.on_card(number):
            sizes += block.largest
        elif not expert_is_on_card(number, options):
            sizes.append(block.largest[1])
    if options.outputs >= OFFLOAD_MIN_ROWS:
        output = shape.outer.get("output.weight")
        if output is not None and not outer_is_on_card(shape, "output.weight", options):
            sizes.append(output.aligned_bytes)
    return max(sizes)
