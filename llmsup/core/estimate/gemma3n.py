"""Gemma 3n: four streams of which each layer works on one and corrects the others by it."""

from dataclasses import dataclass

from llmsup.core.estimate.attention import attend, attention, head_norm
from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.graph import HOST, Tensor, matmul, op, same, view, weight

SPARSE_LAYERS = 10


@dataclass(frozen=True, slots=True)
class Streams:
    """What the layers share: how many streams there are, and what each layer gets of its own."""

    count: int
    own: int
    inputs: Tensor


def begin(b: Builder, x: Tensor) -> tuple[Tensor, Streams]:
    """One stream becomes all of them."""
    count = max(2, int(b.shape.number("altup.num_inputs")))
    size = int(b.shape.number("embedding_length_per_layer_input")) or 256
    width, tokens = x.shape
    layers = len(b.shape.blocks)
    table = b.outer("per_layer_token_embd.weight") or weight(0, HOST)
    flat, each = (size * layers, tokens), (size, layers, tokens)
    own = op("get_rows", flat, table, b.input("own_tokens", 4 * tokens))
    own = same("scale", view(own, each))
    b.graph.expand(own)
    made = _outer_product(b, "per_layer_model_proj.weight", x, flat[0])
    made = b.norm_by(
        view(same("scale", made), each), b.outer("per_layer_proj_norm.weight"), None, pin=False
    )
    made = same("scale", same("add", made, own))
    inputs = op("cont", (size, tokens, layers), view(made, each))
    magnitude = _magnitude(x)
    repeated = op("repeat", (width, tokens, count - 1), x)
    added = _outer_product(b, "altup_proj.weight", repeated, width)
    added = same("div", same("mul", added, magnitude), _magnitude(added))
    return op("concat", (width, tokens, count), x, added), Streams(count, size, inputs)


def layer(b: Builder, streams: Streams, x: Tensor) -> Tensor:
    """One layer, from all streams to all streams."""
    width, tokens, count = x.shape
    slice_ = (width, tokens)
    predictions = _predicted(b, streams, x)
    active = view(predictions, slice_)
    normed = b.norm(active, "attn_norm")
    laurel = b.norm(b.needed("laurel_r", b.needed("laurel_l", normed)), "laurel_post_norm")
    laurel = same("add", laurel, normed)
    cur = b.norm(_attention(b, normed), "post_attention_norm")
    cur = same("add", cur, active)
    middle = same("scale", same("add", cur, laurel))
    cur = b.norm(_feed_forward(b, b.norm(middle, "ffn_norm")), "post_ffw_norm", pin=False)
    cur = same("add", cur, middle)
    corrected = _corrected(b, streams, predictions, cur)
    first = same("mul", view(corrected, slice_), _needed(b, "altup_correct_scale.weight"))
    first = same("unary", b.needed("inp_gate", first))
    first = same("mul", first, view(streams.inputs, (streams.own, tokens)))
    first = b.norm(b.needed("proj", first), "post_norm")
    rest = op("add", (width, tokens, count - 1), view(corrected, (width, tokens, count - 1)), first)
    return op("concat", x.shape, view(corrected, slice_), rest)


def end(b: Builder, x: Tensor) -> Tensor:
    """All streams become one again."""
    width, tokens, count = x.shape
    slice_ = (width, tokens)
    magnitude = _magnitude(view(x, slice_))
    others = _outer_product(
        b, "altup_unembd_proj.weight", view(x, (width, tokens, count - 1)), width
    )
    others = same("div", same("mul", others, magnitude), _magnitude(others))
    cur = view(x, slice_)
    for _ in range(count - 1):
        cur = same("add", cur, view(others, slice_))
    return b.outputs(same("scale", cur))


def _needed(b: Builder, name: str) -> Tensor:
    return b.weight(name) or weight(0, b.home)


def _outer_product(b: Builder, name: str, x: Tensor, width: int) -> Tensor:
    return matmul(b.outer(name) or weight(0, HOST), x, width)


def _magnitude(x: Tensor) -> Tensor:
    return same("sqrt", op("sum_rows", (1, *x.shape[1:]), same("sqr", x)))


def _modalities(b: Builder, streams: Streams, x: Tensor) -> Tensor:
    routed = same("scale", b.norm(x, "altup_router_norm"))
    return same("unary", matmul(_needed(b, "altup_router.weight"), routed, streams.count))


def _predicted(b: Builder, streams: Streams, x: Tensor) -> Tensor:
    width, tokens, count = x.shape
    modalities = _modalities(b, streams, view(x, (width, tokens)))
    factors = matmul(_needed(b, "altup_predict_coef.weight"), modalities, count * count)
    turned = op("cont", (count, width, tokens), view(x, x.shape))
    mixed = op("mul_mat", (width, count, tokens), turned, view(factors, (count, count, tokens)))
    return same("add", op("cont", x.shape, view(mixed, x.shape)), x)


def _corrected(b: Builder, streams: Streams, predictions: Tensor, cur: Tensor) -> Tensor:
    width, tokens, count = predictions.shape
    modalities = _modalities(b, streams, cur)
    innovation = same("sub", cur, view(predictions, (width, tokens)))
    factors = matmul(_needed(b, "altup_correct_coef.weight"), modalities, count)
    factors = op("cont", (1, tokens, count), view(same("scale", factors), (tokens, count)))
    repeated = op("repeat", predictions.shape, innovation)
    return same("add", same("mul", repeated, factors), predictions)


def _attention(b: Builder, x: Tensor) -> Tensor:
    if b.block.has_cache:
        return attention(b, x)
    block = b.block
    q = view(b.needed("attn_q", x), (block.key_length, block.heads, b.tokens))
    q = b.rope(head_norm(b, q, "attn_q_norm"))
    return b.needed("attn_output", attend(b, q, None, None))


def _feed_forward(b: Builder, x: Tensor) -> Tensor:
    up, gate = b.needed("ffn_up", x), b.needed("ffn_gate", x)
    if b.number < SPARSE_LAYERS:
        gate = _largest(gate)
    return b.needed("ffn_down", same("mul", up, same("unary", gate)))


def _largest(x: Tensor) -> Tensor:
    """Only what stands out of a token's values."""
    row = (1, *x.shape[1:])
    mean = op("mean", row, x)
    squares = op("sum_rows", row, same("sqr", same("sub", x, mean)))
    cutoff = same("add", mean, same("scale", same("sqrt", same("scale", squares))))
    return same("unary", same("sub", x, cutoff))
