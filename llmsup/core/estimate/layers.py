"""The graph of a model for one long prompt: the operations of its layers, in the engine's order.

The order is that of src/models/*.cpp and src/llama-graph.cpp of llama.cpp b11434.
"""

from dataclasses import dataclass, field
from math import prod

from llmsup.core.estimate.effective import Effective
from llmsup.core.estimate.graph import (
    CARD,
    HOST,
    Graph,
    Tensor,
    cache,
    leaf,
    matmul,
    op,
    same,
    view,
    weight,
)
from llmsup.core.estimate.kv_cache import row_bytes, widths
from llmsup.core.estimate.weights import expert_is_on_card, outer_is_on_card, tied_output
from llmsup.core.ggml import TYPES
from llmsup.core.shape import Block, ModelShape

_F16, _F32 = 2, 4
_MOE_FUSED_MAX = 15
"""CUDA adds up the results of so many experts in one kernel, which needs all of them."""


@dataclass
class Inputs:
    """What is filled on the host for each batch; some only once they are needed."""

    made: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, size: int, shape: tuple[int, ...] = ()) -> Tensor:
        """The input called `name`."""
        if name not in self.made:
            self.made[name] = leaf(size, shape)
        return self.made[name]


class Builder:
    """Builds the graph of some layers of a model, one operation after another."""

    def __init__(self, shape: ModelShape, options: Effective) -> None:
        self.shape = shape
        self.options = options
        self.graph = Graph()
        self.inputs = Inputs()
        self.kept: dict[Tensor, list[Tensor]] = {}
        self.tokens = options.tokens
        self.outer: dict[str, Tensor] = {}
        full = options.first_block == 0 and options.has_output
        self.pins = full or options.tokens < 32
        self.block: Block
        self.number = 0
        self.is_last = False

    # -- what the operations work on

    def w(self, name: str) -> Tensor | None:
        """A weight of the present layer."""
        found = self.block.weights.get(name)
        if found is None:
            return None
        on_card = self.options.on_card(self.number)
        if found.is_expert:
            on_card = expert_is_on_card(self.number, self.options)
        return weight(found.device_bytes, CARD if on_card else HOST, found.shape)

    def o(self, name: str) -> Tensor | None:
        """A weight that belongs to no layer."""
        found = self.shape.outer.get(name)
        if found is None:
            return None
        if name not in self.outer:
            on_card = outer_is_on_card(self.shape, name, self.options)
            self.outer[name] = weight(found.device_bytes, CARD if on_card else HOST, found.shape)
        return self.outer[name]

    # -- small pieces

    def norm(self, x: Tensor, name: str, *, plain: bool = False) -> Tensor:
        """A norm of the present layer, with its factors and its bias."""
        return self._norm(x, self.w(f"{name}.weight"), self.w(f"{name}.bias"), plain=plain)

    def _norm(
        self,
        x: Tensor,
        factors: Tensor | None,
        bias: Tensor | None,
        *,
        plain: bool,
        pin: bool = True,
    ) -> Tensor:
        cur = same("norm" if plain else "rms_norm", x)
        if pin and self.pins and (factors is not None or bias is not None):
            cur.pinned = CARD if self.options.on_card(self.number) else HOST
        if factors is not None:
            cur = same("mul", cur, factors)
        if bias is not None:
            cur = same("add", cur, bias)
        return cur

    def product(self, name: str, x: Tensor) -> Tensor | None:
        """A product with a matrix of the present layer, and its bias."""
        matrix = self.w(f"{name}.weight")
        if matrix is None:
            return None
        width = matrix.shape[1] if len(matrix.shape) > 1 else 1
        cur = matmul(matrix, x, width)
        bias = self.w(f"{name}.bias")
        return cur if bias is None else same("add", cur, bias)

    def rope(self, x: Tensor) -> Tensor:
        positions = self.inputs.of("positions", 4 * self.tokens)
        factors = self._rope_factors()
        return (
            same("rope", x, positions) if factors is None else same("rope", x, positions, factors)
        )

    def _rope_factors(self) -> Tensor | None:
        """The copy of the present layer's side: the engine makes one for the card."""
        for name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
            found = self.shape.outer.get(name)
            if found is not None:
                home = CARD if self.options.on_card(self.number) else HOST
                key = f"{name}@{home}"
                if key not in self.outer:
                    self.outer[key] = weight(found.device_bytes, home, found.shape)
                return self.outer[key]
        return None

    # -- the beginning and the end

    def embed(self) -> Tensor:
        width, tokens = self.shape.embedding, self.tokens
        table = self.o("token_embd.weight") or weight(0, HOST)
        chosen = op("get_rows", (width, tokens), table, self.inputs.of("tokens", 4 * tokens))
        self.graph.expand(chosen)
        mixed = self.inputs.of("mixed_embd", _F32 * width * tokens, (width, tokens))
        base = same("dup", mixed)
        rows = op("get_rows", (width, tokens), table, self.inputs.of("mixed_tokens", 4 * tokens))
        slots = self.inputs.of("mixed_slots", 8 * tokens)
        stored = op("set_rows", (width, tokens), rows, slots, base)
        stored.root = base
        self.graph.expand(stored)
        cur = chosen
        if self.shape.architecture in (
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma-embedding",
        ):
            cur = same("mul", cur, self.inputs.of("scale_rows", _F32 * tokens))
        self.graph.expand(cur)
        types = self.o("token_types.weight")
        if types is not None:
            cur = same("add", cur, view(types, (width,)))
        places = self.o("position_embd.weight")
        if places is not None:
            positions = self.inputs.of("positions", 4 * tokens)
            cur = same("add", op("get_rows", (width, tokens), places, positions), cur)
        if not self.shape.traits.is_causal:
            self.number = 0
            cur = self._norm(cur, self.o("token_embd_norm.weight"),
                             self.o("token_embd_norm.bias"), plain=True)
        return cur

    def finish(self, x: Tensor) -> None:
        if not self.shape.traits.is_causal:
            self.graph.expand(x)
            self._pool(x)
            return
        cur = self._norm(
            x, self.o("output_norm.weight"), self.o("output_norm.bias"), plain=False, pin=False
        )
        found = self.shape.outer.get("output.weight") or tied_output(self.shape)
        if found is not None:
            home = CARD if self.options.has_output else HOST
            matrix = weight(found.device_bytes, home, found.shape)
            cur = matmul(matrix, cur, found.shape[1])
        self.graph.expand(cur)

    def _pool(self, x: Tensor) -> None:
        slots = self.options.slots
        if self.shape.number("pooling_type") == 1:
            mean = self.inputs.of("mean", _F32 * x.shape[1] * slots, (x.shape[1], slots))
            turned = same("cont", view(x, (x.shape[1], x.shape[0])))
            self.graph.expand(op("mul_mat", (x.shape[0], slots), turned, mean))
        elif self.shape.number("pooling_type"):
            chosen = self.inputs.of("cls", 4 * slots)
            self.graph.expand(op("get_rows", (x.shape[0], slots), x, chosen))

    # -- attention

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block, tokens = self.block, self.tokens
        key, value, heads, kv_heads = (
            block.key_length, block.value_length, block.heads, block.kv_heads,
        )  # fmt: skip
        shapes = ((key, heads, tokens), (key, kv_heads, tokens), (value, kv_heads, tokens))
        fused = self.product("attn_qkv", x)
        if fused is not None:
            q, k, v = (view(fused, each) for each in shapes)
            return q, k, v
        made = []
        for name, each in zip(("attn_q", "attn_k", "attn_v"), shapes, strict=True):
            product = self.product(name, x)
            if product is None:
                product = op("mul_mat", (each[0] * each[1], tokens), x)
            made.append(view(product, each))
        return made[0], made[1], made[2]

    def hadamard(self, x: Tensor, length: int, name: str) -> Tensor:
        order = 64
        if name == "k_rot":
            while length % (2 * order) == 0:
                order *= 2
        suffix = "_swa" if self.block.window else ""
        rot = self.inputs.of(f"{name}{suffix}", _F32 * order * order, (order, order))
        flat = view(x, (order, prod(x.shape) // order))
        turned = op("mul_mat", flat.shape, rot, flat)
        return view(turned, x.shape)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        v_mla: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        block, options, graph = self.block, self.options, self.graph
        quantised = [TYPES[each].block > 1 for each in (options.k_type, options.v_type)]
        has_cache = block.has_cache
        is_mla = v_mla is not None
        value_length = k_length = 0
        k_length, value_length = block.key_length, block.value_length
        turn_v = False
        if has_cache and not is_mla:
            if quantised[0] and k_length % 64 == 0:
                q, k = self.hadamard(q, k_length, "k_rot"), self.hadamard(k, k_length, "k_rot")
            turn_v = quantised[1] and value_length % 64 == 0
            if turn_v:
                v = self.hadamard(v, value_length, "v_rot")
        order = (q, k, v) if self.has_windows or not has_cache else (q, v, k)
        for each in order:
            graph.expand(each)
        if not has_cache:
            cur = self._attend_now(q, k, v)
        else:
            cur = self._attend_cache(q, k, v, v_mla, sinks)
        graph.expand(cur)
        if turn_v:
            cur = self.hadamard(cur, value_length, "v_rot")
        return cur

    @property
    def has_windows(self) -> bool:
        return any(each.window for each in self.shape.blocks[: self.shape.trunk])

    def _mask(self, cells: int) -> Tensor:
        width = _F16 if self.options.flash_attn else _F32
        name = f"mask{'_swa' if self.block.window else ''}"
        return self.inputs.of(name, width * cells * self.tokens)

    def _attend_now(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block, tokens = self.block, self.tokens
        mask = self._mask(tokens)
        heads, value = block.heads, block.value_length
        qv, kv, vv = (view(each, (*each.shape,)) for each in (q, k, v))
        qv, kv, vv = (view(each, (*each.shape,)) for each in (qv, kv, vv))
        if self.options.flash_attn:
            kc, vc = (
                Tensor("cpy", each.shape, each.size // 2, (each,), rows=1) for each in (kv, vv)
            )
            cur = op("flash_attn", (value, heads, tokens), qv, kc, vc, mask)
            return view(cur, (value * heads, tokens))
        kq = op("mul_mat", (tokens, tokens, heads), kv, qv)
        kq = same("soft_max", kq, mask)
        vt = same("cont", view(vv, vv.shape))
        kqv = op("mul_mat", (value, tokens, heads), vt, kq)
        return op("cont", (value * heads, tokens), view(kqv, kqv.shape))

    def _attend_cache(
        self, q: Tensor, k: Tensor, v: Tensor, v_mla: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        block, options, graph, tokens = self.block, self.options, self.graph, self.tokens
        cells, streams = options.window_cells(block.window), options.streams
        home = CARD if options.kv_offload and options.on_card(self.number) else HOST
        suffix = "_swa" if block.window else ""
        key_width, value_width = widths(self.shape, block)
        k_bytes = row_bytes(options.k_type, key_width) * cells * streams
        k_cache = cache(k_bytes, home)
        k_ids = self.inputs.of(f"k_idxs{suffix}", 8 * tokens)
        store = op("set_rows", (1,), view(k, (key_width, tokens)), k_ids, k_cache)
        store.root = k_cache
        graph.expand(store)
        k_view = view(k_cache, (), k_bytes + _padding(options.k_type, block.key_length))
        if v_mla is None:
            v_bytes = row_bytes(options.v_type, value_width) * cells * streams
            v_cache = cache(v_bytes, home)
            if options.flash_attn:
                v_ids = self.inputs.of(f"v_idxs{suffix}", 8 * tokens)
                stored = view(v, (value_width, tokens))
            else:
                widest = max(widths(self.shape, each)[1] for each in self.shape.blocks)
                v_ids = self.inputs.of(f"v_idxs{suffix}", 8 * tokens * widest)
                stored = v
                if v.root is not None and prod(v.root.shape) != prod(v.shape):
                    stored = op("cont", (value_width, tokens), v)
                stored = view(view(stored, (value_width, tokens)), (1, value_width * tokens))
            store = op("set_rows", (1,), stored, v_ids, v_cache)
            store.root = v_cache
            graph.expand(store)
            v_view = view(v_cache, (), v_bytes + _padding(options.v_type, block.value_length))
        else:
            v_view = view(k_view, (), k_bytes)
        mask = self._mask(cells)
        return self._weigh(q, k_view, v_view, mask, sinks, v_mla, cells * streams)

    def _weigh(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        sinks: Tensor | None,
        v_mla: Tensor | None,
        cells: int,
    ) -> Tensor:
        block, options, tokens = self.block, self.options, self.tokens
        heads, streams = block.heads, options.streams
        key = block.key_length
        value = block.value_length
        kv_heads = 1 if v_mla is not None else block.kv_heads
        if v_mla is not None:
            value = int(self.shape.number("attention.kv_lora_rank")) or value
        q = view(view(q, q.shape), q.shape)
        k = view(k, (), k.size)
        v = view(v, (), v.size)
        if options.flash_attn:
            extra = [each for each in (mask, sinks) if each is not None]
            cur = op("flash_attn", (value, heads, tokens), q, k, v, *extra)
            scratch = cur.size
            if options.k_type != 1:
                scratch += -scratch % 128 + 2 * key * kv_heads * cells
            if options.v_type != 1 and v_mla is None:
                scratch += -scratch % 128 + 2 * value * kv_heads * cells
            cur.size = scratch
            if v_mla is not None:
                inner = view(cur, (value, tokens, heads))
                width = v_mla.shape[1]
                cur = matmul(v_mla, inner, width)
                cur = op("cont", (width, heads, tokens), view(cur, (width, heads, tokens)))
                value = width
            return view(cur, (value * heads, tokens))
        kq = op("mul_mat", (cells // streams, tokens // streams, heads, streams), k, q)
        extra = [each for each in (mask, sinks) if each is not None]
        kq = same("soft_max", kq, *extra)
        if v_mla is not None:
            v = Tensor(
                "cont",
                (),
                TYPES[options.k_type].block_bytes * value * cells // TYPES[options.k_type].block,
                (view(v, (), v.size),),
                rows=1,
            )
        kqv = op("mul_mat", (value, tokens // streams, heads, streams), v, kq)
        if v_mla is not None:
            value = v_mla.shape[1]
            kqv = matmul(v_mla, kqv, value)
        cur = op("cont", (value * heads, tokens), view(kqv, kqv.shape))
        if not options.kv_offload:
            cur.pinned = HOST
        return cur

    def attention(self, x: Tensor) -> Tensor:
        """Attention of the present layer on what the norm gave."""
        if (
            self.shape.number("attention.key_length_mla")
            and "attn_kv_a_mqa.weight" in self.block.weights
        ):
            return self._mla(x)
        q, k, v = self.qkv(x)
        if "attn_q_norm.weight" in self.block.weights:
            q = self.norm(q, "attn_q_norm")
        q = self.rope(q)
        if "attn_k_norm.weight" in self.block.weights:
            k = self.norm(k, "attn_k_norm")
        k = self.rope(k)
        if self.shape.architecture in ("gemma2", "gemma3", "gemma3n", "phi3", "phi2"):
            q = same("scale", q)
        cur = self.attend(q, k, v, sinks=self.w("attn_sinks.weight"))
        return self.product("attn_output", cur) or cur

    def _mla(self, x: Tensor) -> Tensor:
        shape, block, tokens = self.shape, self.block, self.tokens
        rank = int(shape.number("attention.kv_lora_rank"))
        key = int(shape.number("attention.key_length_mla"))
        turned = int(shape.number("rope.dimension_count"))
        heads = block.heads
        if "attn_q.weight" in block.weights:
            q = self.product("attn_q", x)
        else:
            q = self.product("attn_q_a", x)
            assert q is not None
            q = self.product("attn_q_b", self.norm(q, "attn_q_a_norm"))
        assert q is not None
        q = view(q, (key, heads, tokens))
        both = self.product("attn_kv_a_mqa", x)
        assert both is not None
        latent = view(both, (rank, tokens))
        k_pe = self.rope(view(both, (turned, 1, tokens)))
        latent = self.norm(latent, "attn_kv_a_norm")
        q_nope = view(q, (key - turned, heads, tokens))
        q_pe = self.rope(view(q, (turned, heads, tokens)))
        q_nope = view(q_nope, (key - turned, tokens, heads))
        k_b, v_b = self.w("attn_k_b.weight"), self.w("attn_v_b.weight")
        assert k_b is not None
        assert v_b is not None
        absorbed = view(matmul(k_b, q_nope, rank), (rank, heads, tokens))
        q = op("concat", (rank + turned, heads, tokens), absorbed, q_pe)
        latent = view(latent, (rank, 1, tokens))
        k = op("concat", (rank + turned, 1, tokens), latent, k_pe)
        cur = self.attend(q, k, latent, v_mla=v_b)
        return self.product("attn_output", cur) or cur

    # -- feed-forward

    def feed_forward(self, x: Tensor, suffix: str = "") -> Tensor:
        """The dense feed-forward of the present layer, or its shared expert."""
        up = self.product(f"ffn_up{suffix}", x)
        if up is None:
            return x
        gate = self.product(f"ffn_gate{suffix}", x)
        if gate is not None:
            cur = op("glu", gate.shape, gate, up)
        else:
            down = self.block.weights.get(f"ffn_down{suffix}.weight")
            inner = down.shape[0] if down is not None else up.shape[0]
            if inner * 2 == up.shape[0]:
                cur = op("glu", (inner, *up.shape[1:]), up)
            else:
                cur = same("unary", up)
        return self.product(f"ffn_down{suffix}", cur) or cur

    def experts(self, x: Tensor) -> Tensor:
        """The experts of the present layer. A copy of their weights is made for each matrix."""
        graph, tokens, width = self.graph, x.shape[1], x.shape[0]
        used = max(1, self.shape.experts_used)
        gpt = self.shape.architecture == "gpt-oss"
        logits = self.product("ffn_gate_inp", x)
        assert logits is not None
        count = logits.shape[0]
        probs = logits if gpt else same("soft_max", logits)
        chosen_by = probs
        bias = self.w("exp_probs_b.bias") or self.w("exp_probs_b")
        if bias is not None:
            chosen_by = same("add", probs, bias)
        order = same("argsort", chosen_by)
        chosen = view(order, (used, tokens))
        weights = op("get_rows", (1, used, tokens), view(probs, (1, count, tokens)), chosen)
        if gpt:
            weights = view(weights, (used, tokens))
            weights = view(same("soft_max", weights), (1, used, tokens))
        elif self._norms_weights():
            weights = view(weights, (used, tokens))
            total = op("sum_rows", (1, tokens), weights)
            weights = same("div", weights, same("clamp", total))
            weights = view(weights, (1, used, tokens))
        scale = self.shape.number("expert_weights_scale")
        if scale not in (0, 1):
            weights = same("scale", weights)
        graph.expand(weights)
        flat = view(x, (width, 1, tokens))

        def by_experts(name: str, source: Tensor) -> Tensor | None:
            matrix = self.w(f"{name}.weight")
            if matrix is None:
                return None
            cur = op(
                "mul_mat_id", (matrix.shape[1], used, tokens), matrix, source, chosen, rows=tokens
            )
            bias = self.w(f"{name}.bias")
            if bias is not None:
                cur = same("add_id", cur, bias, chosen)
            return cur

        up = by_experts("ffn_up_exps", flat)
        gate = by_experts("ffn_gate_exps", flat)
        if up is None:
            both = by_experts("ffn_gate_up_exps", flat)
            assert both is not None
            half = (both.shape[0] // 2, used, tokens)
            cur = op("glu", half, view(both, half), view(both, half))
        elif gate is not None:
            cur = op("glu", gate.shape, gate, up)
        else:
            cur = same("unary", up)
        down = by_experts("ffn_down_exps", cur)
        assert down is not None
        weighted = same("mul", down, weights)
        graph.expand(weighted)
        views = [view(weighted, (width, tokens)) for _ in range(used)]
        for each in views:
            graph.expand(each)
        total_out = views[0]
        for each in views[1:]:
            total_out = same("add", total_out, each)
            graph.expand(total_out)
        if used == 1:
            total_out = same("cont", total_out)
        elif used <= _MOE_FUSED_MAX:
            self.kept[total_out] = [down, weights]
        return total_out

    def _norms_weights(self) -> bool:
        if self.shape.architecture in ("deepseek2", "qwen2moe"):
            return bool(self.shape.number("expert_weights_norm"))
        return True

    # -- layers

    def layer(self, number: int, x: Tensor, *, is_last: bool) -> Tensor:
        """One repeating layer."""
        self.number, self.block, self.is_last = number, self.shape.blocks[number], is_last
        weights = self.block.weights
        arch = self.shape.architecture
        if "bert" in arch:
            return self._encoder(x, is_last=is_last)
        cur = self.attention(self.norm(x, "attn_norm"))
        if is_last and arch != "gpt-oss":
            ids = self.inputs.of("out_ids", 4 * self.options.outputs)
            rows = (self.shape.embedding, self.options.outputs)
            cur, x = op("get_rows", rows, cur, ids), op("get_rows", rows, x, ids)
        sandwich = arch in ("gemma2", "gemma3", "gemma3n", "gemma4")
        if sandwich and "post_attention_norm.weight" in weights:
            cur = self.norm(cur, "post_attention_norm")
        middle = same("add", cur, x)
        name = "post_attention_norm" if arch == "gpt-oss" else "ffn_norm"
        cur = self.norm(middle, name)
        if "ffn_gate_inp.weight" in weights:
            routed = self.experts(cur)
            if "ffn_up_shexp.weight" in weights:
                routed = same("add", routed, self.feed_forward(cur, "_shexp"))
            cur = routed
        else:
            cur = self.feed_forward(cur)
        if sandwich and "post_ffw_norm.weight" in weights:
            cur = self.norm(cur, "post_ffw_norm")
        if arch == "phi3":
            cur = same("add", middle, cur)
        else:
            cur = same("add", cur, middle)
        if is_last and arch == "gpt-oss":
            ids = self.inputs.of("out_ids", 4 * self.options.outputs)
            self.graph.expand(cur)
            cur = op("get_rows", (self.shape.embedding, self.options.outputs), cur, ids)
        return cur

    def _encoder(self, x: Tensor, *, is_last: bool) -> Tensor:
        arch = self.shape.architecture
        q, k, v = self.qkv(x)
        if arch != "bert":
            q, k = self.rope(q), self.rope(k)
        cur = self.attend(q, k, v)
        cur = self.product("attn_output", cur) or cur
        if is_last:
            ids = self.inputs.of("out_ids", 4 * self.options.outputs)
            rows = (self.shape.embedding, self.options.outputs)
            cur, x = op("get_rows", rows, cur, ids), op("get_rows", rows, x, ids)
        cur = self.norm(same("add", cur, x), "attn_output_norm", plain=True)
        middle = cur
        cur = same("add", self.feed_forward(cur), middle)
        return self.norm(cur, "layer_output_norm", plain=True)


def _padding(type_id: int, width: int) -> int:
    if TYPES[type_id].block == 1 or width % 512 == 0:
        return 0
    return row_bytes(type_id, 512 - width % 512)
