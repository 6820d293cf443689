"""The feed-forward of a layer: one for all tokens, or some of many experts for each."""

from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.graph import Tensor, op, same, view

_FUSED_COUNTS = (*(1 << power for power in range(10)), 288, 576)
"""Of so many experts CUDA chooses in one kernel."""
_FUSED_SUM_MAX = 15
"""The results of so many experts CUDA adds up in one kernel."""


def feed_forward(b: Builder, x: Tensor) -> Tensor:
    """The feed-forward of the present layer, whatever it has."""
    if not b.has("ffn_gate_inp"):
        return dense(b, x)
    routed = experts(b, x)
    if not b.has("ffn_up_shexp"):
        return routed
    gate = b.product("ffn_gate_inp_shexp", x)
    if gate is not None:
        gate = _shared_gate(b, gate)
    shared = dense(b, x, "_shexp")
    if gate is not None:
        shared = same("mul", shared, gate)
    return same("add", routed, shared)


def _shared_gate(b: Builder, gate: Tensor) -> Tensor:
    if b.shape.architecture == "qwen2moe":
        return same("div", same("unary", gate), gate)
    return same("unary", gate)


def dense(b: Builder, x: Tensor, suffix: str = "") -> Tensor:
    """The dense feed-forward of the present layer, or its shared expert."""
    up = b.product(f"ffn_up{suffix}", x)
    if up is None:
        return x
    gate = b.product(f"ffn_gate{suffix}", x)
    if gate is not None:
        cur = op("glu", gate.shape, gate, up)
    else:
        down = b.block.weights.get(f"ffn_down{suffix}.weight")
        if down is not None and down.shape[0] * 2 == up.shape[0]:
            cur = op("glu", (down.shape[0], *up.shape[1:]), up)
        else:
            cur = same("unary", up)
            if b.traits.squares:
                cur = same("sqr", cur)
    return b.needed(f"ffn_down{suffix}", cur)


def experts(b: Builder, x: Tensor) -> Tensor:
    """The experts of the present layer, those that the router chose for each token."""
    width, tokens = x.shape
    used = max(1, b.shape.experts_used)
    probs, chosen, weights = _choice(b, x, used)
    flat = view(x, (width, 1, tokens))
    if not b.traits.weighs_late and probs.shape[0] in _FUSED_COUNTS:
        _keep_choice(b, probs, weights, flat)

    def by_experts(name: str, source: Tensor) -> Tensor | None:
        matrix = b.weight(f"{name}.weight")
        if matrix is None or len(matrix.shape) < 2:
            return None
        shape = (matrix.shape[1], used, tokens)
        cur = op("mul_mat_id", shape, matrix, source, chosen, rows=tokens)
        bias = b.weight(f"{name}.bias")
        return cur if bias is None else same("add_id", cur, bias, chosen)

    up = by_experts("ffn_up_exps", flat)
    gate = by_experts("ffn_gate_exps", flat)
    both = by_experts("ffn_gate_up_exps", flat) if up is None else None
    if both is not None:
        half = (both.shape[0] // 2, used, tokens)
        cur = op("glu", half, view(both, half), view(both, half))
    elif up is None:
        return x
    elif gate is not None:
        cur = op("glu", gate.shape, gate, up)
    else:
        cur = same("unary", up)
        if b.traits.squares:
            cur = same("sqr", cur)
    down = by_experts("ffn_down_exps", cur)
    return x if down is None else _sum(b, down, weights)


def _choice(b: Builder, x: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the router thinks of each expert, which ones a token gets, and their weights."""
    tokens = x.shape[1]
    logits = b.needed("ffn_gate_inp", x)
    count = logits.shape[0]
    late = b.traits.weighs_late
    probs = logits if late else same("unary" if _is_sigmoid(b) else "soft_max", logits)
    chosen_by = probs
    bias = b.weight("exp_probs_b.bias") or b.weight("exp_probs_b.weight")
    if bias is not None:
        chosen_by = same("add", probs, bias)
    columns = view(probs, (1, count, tokens))
    order = op("argsort", (count, tokens), chosen_by)
    chosen = view(order, (used, tokens))
    weights = op("get_rows", (1, used, tokens), columns, chosen)
    if late:
        weights = view(same("soft_max", view(weights, (used, tokens))), (1, used, tokens))
    if _norms_weights(b):
        flat = view(weights, (used, tokens))
        total = same("clamp", op("sum_rows", (1, tokens), flat))
        weights = view(same("div", flat, total), (1, used, tokens))
    if b.shape.number("expert_weights_scale") not in (0, 1):
        weights = same("scale", weights)
    b.graph.expand(weights)
    return probs, chosen, weights


def _is_sigmoid(b: Builder) -> bool:
    said = int(b.shape.number("expert_gating_func"))
    return said == 2 if said else b.traits.gates_by_sigmoid


def _norms_weights(b: Builder) -> bool:
    said = b.shape.numbers.get("expert_weights_norm")
    return b.traits.norms_experts if said is None else bool(said)


def _keep_choice(b: Builder, first: Tensor, last: Tensor, after: Tensor) -> None:
    """CUDA chooses in one kernel: all that it reads and writes lasts until that is done."""
    nodes = b.graph.nodes
    begin = end = len(nodes) - 1
    while nodes[end] is not last:
        end -= 1
    while nodes[begin] is not first:
        begin -= 1
    b.graph.expand(after)
    if len(nodes) == end + 1:
        return
    kept = b.kept.setdefault(nodes[end + 1], [])
    for node in nodes[begin : end + 1]:
        kept += [each for each in (node, *node.srcs) if each not in kept]


def _sum(b: Builder, down: Tensor, weights: Tensor) -> Tensor:
    width, used, tokens = down.shape
    weighted = same("mul", down, weights)
    b.graph.expand(weighted)
    views = [view(weighted, (width, tokens)) for _ in range(used)]
    for each in views:
        b.graph.expand(each)
    total = views[0]
    for each in views[1:]:
        total = same("add", total, each)
        b.graph.expand(total)
    if used == 1:
        return same("cont", total)
    if used <= _FUSED_SUM_MAX:
        b.kept[total] = [down, weights]
    return total
