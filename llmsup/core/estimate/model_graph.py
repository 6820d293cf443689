"""The graph of a whole model: its input, its layers, its output, in the engine's order.

The order is that of src/models/*.cpp and src/llama-graph.cpp of llama.cpp b11434.
"""

from collections.abc import Iterable

from llmsup.core.estimate import gemma3n
from llmsup.core.estimate.attention import attend, attention, qkv
from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.feed_forward import dense, feed_forward
from llmsup.core.estimate.graph import HOST, Tensor, matmul, op, same, view, weight, written
from llmsup.core.estimate.recurrent import gated_attention, recurrent

_F32 = 4
_MEAN = 1


def build(b: Builder, layers: Iterable[int]) -> None:
    """The graph with these of the layers."""
    x = embedding(b)
    if b.traits.has_streams:
        x, streams = gemma3n.begin(b, x)
        for number in layers:
            b.number = number
            x = gemma3n.layer(b, streams, x)
        _logits(b, gemma3n.end(b, x))
        return
    for number in layers:
        b.number = number
        is_last = number == b.shape.trunk - 1
        if not b.traits.is_causal:
            x = _encoder(b, x, is_last=is_last)
        else:
            x = _layer(b, x, is_last=is_last)
    if b.traits.is_causal:
        _logits(b, x)
    else:
        _pool(b, x)


def embedding(b: Builder) -> Tensor:
    """The tokens as vectors. A second way in, for batches with other vectors, stays unused."""
    width, tokens = b.shape.embedding, b.tokens
    table = b.outer("token_embd.weight") or weight(0, HOST)
    cur = op("get_rows", (width, tokens), table, b.input("tokens", 4 * tokens))
    b.graph.expand(cur)
    base = same("dup", b.input("mixed_embd", _F32 * width * tokens, (width, tokens)))
    rows = op("get_rows", (width, tokens), table, b.input("mixed_tokens", 4 * tokens))
    b.graph.expand(written("set_rows", base, rows, b.input("mixed_slots", 8 * tokens)))
    if b.shape.number("embedding_scale"):
        cur = same("scale", cur)
    if b.traits.scales_rows:
        cur = same("mul", cur, b.input("scale_rows", _F32 * tokens))
    b.graph.expand(cur)
    types = b.outer("token_types.weight")
    if types is not None:
        cur = same("add", cur, view(types, (width,)))
    places = b.outer("position_embd.weight")
    if places is not None:
        positions = b.input("positions", 4 * tokens)
        cur = same("add", op("get_rows", (width, tokens), places, positions), cur)
    if not b.traits.is_causal:
        names = ("token_embd_norm.weight", "token_embd_norm.bias")
        cur = b.norm_by(cur, *(b.outer(name) for name in names))
    return cur


def _layer(b: Builder, x: Tensor, *, is_last: bool) -> Tensor:
    is_early = is_last and b.traits.drops_rows == "in the layer"
    has_pre, has_middle = b.has("attn_norm"), b.has("ffn_norm")
    has_post = b.has("post_attention_norm")
    normed = b.norm(x, "attn_norm") if has_pre else x
    if b.traits.gates_attention:
        b.graph.expand(normed)
    cur = _mixed(b, x, normed)
    if b.traits.recurrence == "beside":
        return _after_both(b, x, cur, is_early=is_early)
    if not has_middle and not has_post:
        if b.block.has_attention and (b.has("ffn_up") or b.has("ffn_gate_inp")):
            return _beside(b, x, normed, cur, is_early=is_early)
        return _alone(b, x, cur, is_early=is_early)
    if is_early:
        cur, x = b.outputs(cur), b.outputs(x)
    if has_post and (has_middle or not has_pre):
        cur = b.norm(cur, "post_attention_norm")
    cur = _residual(b, cur)
    first, second = (x, cur) if b.traits.adds_to_residual and b.traits.recurrence else (cur, x)
    middle = same("add", first, second)
    if has_middle:
        cur = b.norm(middle, "ffn_norm")
    else:
        cur = b.norm(middle, "post_attention_norm") if has_pre else middle
    cur = feed_forward(b, cur)
    if b.has("post_ffw_norm"):
        cur = b.norm(cur, "post_ffw_norm", pin=False)
    cur = _residual(b, cur)
    return same("add", middle, cur) if b.traits.adds_to_residual else same("add", cur, middle)


def _mixed(b: Builder, x: Tensor, normed: Tensor) -> Tensor:
    """What mixes the tokens: attention, a state, or both."""
    if b.traits.recurrence == "beside":
        attended = attention(b, normed)
        return same("add", attended, recurrent(b, b.norm(x, "attn_norm")))
    if b.block.is_recurrent:
        return recurrent(b, normed)
    if b.traits.gates_attention:
        return gated_attention(b, normed)
    if not b.block.has_attention:
        return feed_forward(b, normed)
    return attention(b, normed)


def _after_both(b: Builder, x: Tensor, cur: Tensor, *, is_early: bool) -> Tensor:
    x = same("add", cur, x)
    if is_early:
        x = b.outputs(x)
    return same("add", feed_forward(b, b.norm(x, "ffn_norm")), x)


def _alone(b: Builder, x: Tensor, cur: Tensor, *, is_early: bool) -> Tensor:
    """A layer that does one thing only."""
    if is_early:
        cur, x = b.outputs(cur), b.outputs(x)
    return same("add", cur, x)


def _residual(b: Builder, x: Tensor) -> Tensor:
    return same("scale", x) if b.shape.number("residual_scale") else x


def _beside(b: Builder, x: Tensor, normed: Tensor, cur: Tensor, *, is_early: bool) -> Tensor:
    """Attention and feed-forward side by side, on what one norm gave."""
    if is_early:
        cur, x, normed = b.outputs(cur), b.outputs(x), b.outputs(normed)
    fed = feed_forward(b, normed)
    if b.traits.sums_branches:
        return same("add", same("add", cur, fed), x)
    return same("add", same("add", fed, x), cur)


def _encoder(b: Builder, x: Tensor, *, is_last: bool) -> Tensor:
    """A layer of a model like BERT: it normalises what it adds up."""
    q, k, v = qkv(b, x)
    if b.traits.rope != "none":
        q, k = b.rope(q), b.rope(k)
    cur = b.needed("attn_output", attend(b, q, k, v))
    if is_last:
        cur, x = b.outputs(cur), b.outputs(x)
    middle = b.norm(same("add", cur, x), "attn_output_norm")
    cur = same("add", dense(b, middle), middle)
    return b.norm(cur, "layer_output_norm")


def _logits(b: Builder, x: Tensor) -> None:
    names = ("output_norm.weight", "output_norm.bias")
    if b.shape.architecture.startswith("lfm2"):
        names = ("token_embd_norm.weight", "token_embd_norm.bias")
    if b.traits.drops_rows == "after it":
        b.graph.expand(x)
        x = b.outputs(x)
    cur = b.norm_by(x, *(b.outer(name) for name in names), pin=False)
    if b.traits.drops_rows == "after the norm":
        cur = b.outputs(cur)
    matrix = None if b.traits.pools_or_talks and b.options.pooled else b.output()
    if matrix is not None and len(matrix.shape) > 1:
        cur = matmul(matrix, cur, matrix.shape[1])
    bias = b.outer("output.bias")
    if bias is not None:
        cur = same("add", cur, bias)
    b.graph.expand(cur)


def _pool(b: Builder, x: Tensor) -> None:
    """One vector for each sequence."""
    b.graph.expand(x)
    slots = b.options.slots
    width, rows = x.shape
    pooling = b.shape.number("pooling_type")
    if pooling == _MEAN:
        mean = b.input("mean", _F32 * rows * slots, (rows, slots))
        turned = same("cont", view(x, (rows, width)))
        b.graph.expand(op("mul_mat", (width, slots), turned, mean))
    elif pooling:
        b.graph.expand(op("get_rows", (width, slots), x, b.input("cls", 4 * slots)))
