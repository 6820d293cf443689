"""Layers that keep a state instead of a cache: Mamba, short convolutions, gated delta nets."""

from math import prod

from llmsup.core.estimate.attention import attend
from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.graph import HOST, Tensor, cache, op, same, view, written

_F32 = 4


def recurrent(b: Builder, x: Tensor) -> Tensor:
    """The present layer's step over its state, by what weights it has."""
    if b.has("shortconv.in_proj"):
        return _short_convolution(b, x)
    if b.has("attn_qkv") or b.has("ssm_ba"):
        return _delta_net(b, x)
    return _mamba(b, x) if b.has("ssm_x") else _mamba2(b, x)


def _per_sequence(b: Builder, width: int) -> tuple[int, int, int]:
    slots = b.options.slots
    return width, b.tokens // slots, slots


def _state(b: Builder, number: int) -> Tensor:
    """One of the two states of the layer, of all sequences."""
    home = b.home if b.options.kv_offload else HOST
    return cache(_F32 * b.block.state[number] * b.options.slots, home)


def _taken(b: Builder, state: Tensor, elements: int) -> Tensor:
    """The states of the batch's sequences, copied out of the cache."""
    slots = b.options.slots
    _zero(b, state, elements)
    rows = op("get_rows", (elements, slots), view(state, (elements, slots)), _order(b), rows=0)
    taken = view(rows, (elements, slots))
    b.graph.expand(taken)
    _written(b, view(rows, (elements, 0), 0), state)
    return taken


def _zero(b: Builder, state: Tensor, elements: int) -> None:
    b.graph.expand(written("scale", view(view(state, (elements, b.options.slots)), (elements,))))


def _written(b: Builder, source: Tensor, state: Tensor) -> None:
    b.graph.expand(written("cpy", view(state, (), 1), source))


def _order(b: Builder) -> Tensor:
    return b.input("state_order", 4 * b.options.slots, (b.options.slots,))


def _scan(b: Builder, state: Tensor, values: int, *operands: Tensor) -> Tensor:
    """A scan reads its states where they lie, and gives values and new states in one."""
    slots = b.options.slots
    elements = b.block.state[1]
    _zero(b, state, elements)
    rest = op(
        "get_rows",
        (elements, slots - 1),
        view(state, (elements, slots)),
        b.view_of_input("state_rest", _order(b), (slots - 1,)),
        rows=0,
    )
    ids = b.view_of_input("state_main", _order(b), (slots,))
    scanned = op("ssm_scan", (values + elements * slots,), view(state, ()), *operands, ids, rows=1)
    b.graph.expand(scanned)
    _written(b, view(rest, (elements, 0), 0), state)
    _written(b, view(scanned, (elements * slots,)), state)
    return scanned


def _convolved(b: Builder, x: Tensor, channels: int, name: str) -> tuple[Tensor, Tensor]:
    """The convolution over the last tokens: its input, and what it gives."""
    kernel = b.weight(f"{name}.weight")
    length = kernel.shape[0] if kernel is not None else 1
    width, tokens, slots = _per_sequence(b, channels)
    state = _state(b, 0)
    taken = view(_taken(b, state, b.block.state[0]), (length - 1, channels, slots))
    joined = op("concat", (length - 1 + tokens, channels, slots), taken, x)
    _written(b, view(joined, (length - 1, channels, slots)), state)
    operands = (joined,) if kernel is None else (joined, kernel)
    out = op("ssm_conv", (width, tokens, slots), *operands)
    out.host_only = channels % 128 != 0
    return joined, out


def _mamba(b: Builder, x: Tensor) -> Tensor:
    inner = int(b.shape.number("ssm.inner_size"))
    size = int(b.shape.number("ssm.state_size"))
    rank = int(b.shape.number("ssm.time_step_rank"))
    shape = _per_sequence(b, inner)
    both = b.needed("ssm_in", view(x, _per_sequence(b, x.shape[0])))
    _, cur = _convolved(b, view(view(both, shape), shape), inner, "ssm_conv1d")
    cur = same("unary", _biased(b, cur, "ssm_conv1d.bias"))
    mixed = b.needed("ssm_x", cur)
    step = view(mixed, _per_sequence(b, rank))
    keys, queries = (view(mixed, (size, 1, *shape[1:])) for _ in range(2))
    if b.has("ssm_dt_norm"):
        step = b.norm(step, "ssm_dt_norm")
        keys, queries = b.norm(keys, "ssm_b_norm"), b.norm(queries, "ssm_c_norm")
    else:
        step = same("cont", step)
    step = b.needed("ssm_dt", step)
    operands = _with(view(cur, (1, *shape)), step, b.weight("ssm_a"), keys, queries)
    scanned = _scan(b, _state(b, 1), prod(shape), *operands)
    y = same("add", view(scanned, shape), _factored(b, cur, "ssm_d"))
    y = op("glu", shape, same("cont", view(both, shape)), y)
    return view(b.needed("ssm_out", y), (x.shape[0], b.tokens))


def _mamba2(b: Builder, x: Tensor) -> Tensor:
    inner = int(b.shape.number("ssm.inner_size"))
    size = int(b.shape.number("ssm.state_size"))
    heads = max(1, int(b.shape.number("ssm.time_step_rank")))
    groups = max(1, int(b.shape.number("ssm.group_count")))
    slots = b.options.slots
    channels = inner + 2 * groups * size
    tokens = b.tokens // slots
    headed = (inner // heads, heads, tokens, slots)
    both = b.needed("ssm_in", x)
    both = view(both, _per_sequence(b, both.shape[0]))
    convolved = _per_sequence(b, channels)
    _, cur = _convolved(b, view(view(both, convolved), convolved), channels, "ssm_conv1d")
    cur = same("unary", _biased(b, cur, "ssm_conv1d.bias"))
    values = view(cur, headed)
    keys, queries = (view(cur, (size, groups, tokens, slots)) for _ in range(2))
    step = _biased(b, same("cont", view(both, _per_sequence(b, heads))), "ssm_dt.bias")
    operands = _with(values, step, b.weight("ssm_a"), keys, queries)
    scanned = _scan(b, _state(b, 1), prod(headed), *operands)
    y = same("add", view(scanned, headed), _factored(b, values, "ssm_d"))
    y = op("glu", headed, same("cont", view(both, headed)), y)
    if b.has("ssm_norm"):
        y = b.norm(view(y, (inner // groups, groups, tokens, slots)), "ssm_norm")
    return b.needed("ssm_out", view(y, (inner, b.tokens)))


def _with(*operands: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(each for each in operands if each is not None)


def _biased(b: Builder, x: Tensor, name: str) -> Tensor:
    bias = b.weight(name)
    return x if bias is None else same("add", x, bias)


def _factored(b: Builder, x: Tensor, name: str) -> Tensor:
    factors = b.weight(name) or b.weight(f"{name}.weight")
    return x if factors is None else same("mul", x, factors)


def _short_convolution(b: Builder, x: Tensor) -> Tensor:
    width = x.shape[0]
    shape = _per_sequence(b, width)
    mixed = b.needed("shortconv.in_proj", view(x, shape))
    gated = same("mul", view(mixed, shape), view(mixed, shape))
    _, out = _convolved(b, view(gated, shape), width, "shortconv.conv")
    out = same("mul", view(mixed, shape), out)
    return view(b.needed("shortconv.out_proj", out), (width, b.tokens))


def _delta_net(b: Builder, x: Tensor) -> Tensor:
    """Linear attention that corrects what it remembers."""
    inner = int(b.shape.number("ssm.inner_size"))
    size = int(b.shape.number("ssm.state_size"))
    key_heads = max(1, int(b.shape.number("ssm.group_count")))
    heads = max(1, int(b.shape.number("ssm.time_step_rank")))
    slots = b.options.slots
    tokens = b.tokens // slots
    channels = inner + 2 * key_heads * size
    mixed = view(b.needed("attn_qkv", x), _per_sequence(b, channels))
    beside = b.needed("attn_gate", x)
    rate, gate = _rates(b, x, heads)
    _, cur = _convolved(b, view(mixed, (tokens, channels, slots)), channels, "ssm_conv1d")
    state = _state(b, 1)
    taken = view(_taken(b, state, b.block.state[1]), (inner // heads, inner // heads, heads, slots))
    cur = same("unary", cur)
    q, k = (same("rms_norm", view(cur, (size, key_heads, tokens, slots))) for _ in range(2))
    v = view(cur, (inner // heads, heads, tokens, slots))
    rows = (inner, tokens * slots + inner // heads * slots)
    out = op("gated_delta_net", rows, q, k, v, gate, rate, taken)
    _written(b, view(out, ()), state)
    headed = (inner // heads, heads, tokens, slots)
    cur = b.norm(view(out, headed), "ssm_norm")
    cur = same("mul", cur, same("unary", view(beside, headed)))
    cur = b.needed("ssm_out", view(cur, _per_sequence(b, inner)))
    return view(cur, (x.shape[0], b.tokens))


def _rates(b: Builder, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """How much a token writes, and how much is forgotten before."""
    per_head = (1, heads, *_per_sequence(b, 1)[1:])
    flat = _per_sequence(b, heads)
    if b.has("ssm_ba"):
        both = b.needed("ssm_ba", x)
        rate = view(same("unary", same("cont", view(both, flat))), per_head)
        alpha = same("cont", view(both, flat))
    else:
        rate = same("unary", view(b.needed("ssm_beta", x), per_head))
        alpha = view(b.needed("ssm_alpha", x), flat)
    gate = same("unary", _biased(b, alpha, "ssm_dt.bias"))
    return rate, view(_factored(b, gate, "ssm_a"), per_head)


def gated_attention(b: Builder, x: Tensor) -> Tensor:
    """Attention whose queries come with a gate for what it gives."""
    block, tokens = b.block, b.tokens
    heads, kv_heads = block.heads, block.kv_heads
    full = b.needed("attn_q", x)
    q = b.rope(b.norm(view(full, (block.key_length, heads, tokens)), "attn_q_norm"))
    k = view(b.needed("attn_k", x), (block.key_length, kv_heads, tokens))
    k = b.rope(b.norm(k, "attn_k_norm"))
    v = view(b.needed("attn_v", x), (block.value_length, kv_heads, tokens))
    cur = attend(b, q, k, v)
    width = block.value_length * heads
    gate = op("cont", (width, tokens), view(full, (block.value_length, heads, tokens)))
    cur = same("mul", cur, same("unary", gate))
    return b.needed("attn_output", cur)
