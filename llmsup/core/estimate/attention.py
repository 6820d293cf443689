"""Attention: queries, keys and values, and what comes of them."""

from math import prod

from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.cached_attention import Asked, from_cache, mask
from llmsup.core.estimate.graph import Tensor, converted, matmul, op, same, view
from llmsup.core.ggml import TYPES

_F32 = 4


def attention(b: Builder, x: Tensor) -> Tensor:
    """Attention of the present layer on what its norm gave."""
    if b.has("attn_kv_a_mqa"):
        if b.shape.number("attention.key_length_mla"):
            return _absorbed(b, x)
        return _latent(b, x)
    q, k, v = qkv(b, x)
    q = _turned(b, head_norm(b, q, "attn_q_norm"))
    k = _turned(b, head_norm(b, k, "attn_k_norm"))
    if b.traits.norms_values:
        v = same("rms_norm", v)
    if b.traits.scales_q:
        q = same("scale", q)
    return b.needed("attn_output", attend(b, q, k, v, sinks=b.weight("attn_sinks.weight")))


def qkv(b: Builder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, by heads."""
    block, tokens = b.block, b.tokens
    heads, kv_heads = block.heads, block.kv_heads
    shapes = (
        (block.key_length, heads, tokens),
        (block.key_length, kv_heads, tokens),
        (block.value_length, kv_heads, tokens),
    )
    fused = b.product("attn_qkv", x)
    if fused is not None:
        q, k, v = (view(fused, each) for each in shapes)
        return q, k, v
    made = []
    for name, each in zip(("attn_q", "attn_k", "attn_v"), shapes, strict=True):
        product = b.product(name, x)
        if product is None:
            product = op("mul_mat", (each[0] * each[1], tokens), x)
        made.append(view(product, each))
    return made[0], made[1], made[2]


def head_norm(b: Builder, x: Tensor, name: str) -> Tensor:
    """The norm of queries or keys, where there is one: of each head, or of all in one."""
    found = b.block.weights.get(f"{name}.weight")
    if found is None:
        return x
    if prod(found.shape) == x.shape[0] or len(found.shape) > 1:
        return b.norm(x, name)
    width = (x.shape[0] * x.shape[1], b.tokens)
    whole = x.srcs[0]
    if whole.shape != width:
        whole = op("cont", width, x)
    return view(b.norm(whole, name), x.shape)


def _turned(b: Builder, x: Tensor) -> Tensor:
    match b.traits.rope:
        case "none":
            return x
        case "sliding" if b.has_windows and not b.block.window:
            return x
        case "not each 4th" if b.number % 4 == 3:
            return x
    return b.rope(x)


def _latent_queries(b: Builder, x: Tensor, length: int) -> Tensor:
    if b.has("attn_q"):
        q = b.needed("attn_q", x)
    else:
        q = b.needed("attn_q_b", b.norm(b.needed("attn_q_a", x), "attn_q_a_norm"))
    return view(q, (length, b.block.heads, b.tokens))


def _absorbed(b: Builder, x: Tensor) -> Tensor:
    """Multi-head latent attention: one short key for all heads serves as value too."""
    tokens, heads = b.tokens, b.block.heads
    rank = int(b.shape.number("attention.kv_lora_rank"))
    key = int(b.shape.number("attention.key_length_mla"))
    turned = int(b.shape.number("rope.dimension_count"))
    q = _latent_queries(b, x, key)
    both = b.needed("attn_kv_a_mqa", x)
    k_pe = b.rope(view(both, (turned, 1, tokens)))
    latent = b.norm(view(both, (rank, tokens)), "attn_kv_a_norm")
    q_pe = b.rope(view(q, (turned, heads, tokens)))
    q_nope = view(view(q, (key - turned, heads, tokens)), (key - turned, tokens, heads))
    k_b, v_b = b.weight("attn_k_b.weight"), b.weight("attn_v_b.weight")
    absorbed = q_nope if k_b is None else matmul(k_b, q_nope, rank)
    absorbed = view(absorbed, (rank, heads, tokens))
    q = op("concat", (rank + turned, heads, tokens), absorbed, q_pe)
    latent = view(latent, (rank, 1, tokens))
    k = op("concat", (rank + turned, 1, tokens), latent, k_pe)
    return b.needed("attn_output", attend(b, q, k, latent, v_mla=v_b))


def _latent(b: Builder, x: Tensor) -> Tensor:
    """Keys and values of all heads are made of a short one, and kept as such."""
    block, tokens, heads = b.block, b.tokens, b.block.heads
    key, value = block.key_length, block.value_length
    rank = int(b.shape.number("attention.kv_lora_rank"))
    turned = int(b.shape.number("rope.dimension_count"))
    q = _latent_queries(b, x, key)
    both = b.needed("attn_kv_a_mqa", x)
    k_pe = b.rope(view(both, (turned, 1, tokens)))
    kv = b.needed("attn_kv_b", b.norm(view(both, (rank, tokens)), "attn_kv_a_norm"))
    k_nope = view(kv, (key - turned, heads, tokens))
    v = op("cont", (value, heads, tokens), view(kv, (value, heads, tokens)))
    q = b.rope(q)
    repeated = op("repeat", (turned, heads, tokens), k_pe)
    k = op("concat", (key, heads, tokens), k_nope, repeated)
    return b.needed("attn_output", attend(b, q, k, v))


def attend(
    b: Builder,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    v_mla: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What queries find in the cache, once keys and values are in it.

    Without keys and values it is the cache of an earlier layer.
    """
    block, options = b.block, b.options
    turns_v = False
    if b.traits.has_cache and v_mla is None:
        # A quantised cache keeps keys and values turned, which spreads their outliers.
        if TYPES[options.k_type].block > 1 and block.key_length % 64 == 0:
            q = _hadamard(b, q, "k", block.key_length)
            k = None if k is None else _hadamard(b, k, "k", block.key_length)
        turns_v = TYPES[options.v_type].block > 1 and block.value_length % 64 == 0
        if turns_v and v is not None:
            v = _hadamard(b, v, "v", 64)
    order = (q, k, v) if b.has_windows or not b.traits.has_cache else (q, v, k)
    for each in order:
        if each is not None:
            b.graph.expand(each)
    if b.traits.has_cache:
        cur = from_cache(b, Asked(q, k, v, v_mla, sinks))
    else:
        cur = _from_batch(b, q, k or q, v or q)
    b.graph.expand(cur)
    return _hadamard(b, cur, "v", 64) if turns_v else cur


def _hadamard(b: Builder, x: Tensor, name: str, length: int) -> Tensor:
    order = 64
    while length % (2 * order) == 0:
        order *= 2
    sliding = "_swa" if b.block.window else ""
    turn = b.input(f"{name}_rot{sliding}", _F32 * order * order, (order, order))
    flat = view(x, (order, prod(x.shape) // order))
    return view(op("mul_mat", flat.shape, turn, flat), x.shape)


def _from_batch(b: Builder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a cache: all tokens of the batch to one another."""
    tokens, heads, value = b.tokens, b.block.heads, b.block.value_length
    shown = mask(b, tokens)
    q, k, v = (view(view(each, each.shape), each.shape) for each in (q, k, v))
    if b.options.flash_attn:
        halves = [converted("cpy", each.size // 2, each) for each in (k, v)]
        cur = op("flash_attn", (value, heads, tokens), q, *halves, shown)
        cur.host_only = not b.options.has_kernel
        return view(cur, (value * heads, tokens))
    kq = same("soft_max", op("mul_mat", (tokens, tokens, heads), k, q), shown)
    v = same("cont", view(v, v.shape))
    kqv = op("mul_mat", (value, tokens, heads), v, kq)
    return op("cont", (value * heads, tokens), view(kqv, kqv.shape))
