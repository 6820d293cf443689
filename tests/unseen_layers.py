"""The tensors that llama.cpp wants in a layer of each architecture, by a model's `Shape`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.gguf_files import Item


@dataclass(frozen=True)
class Shape:
    """Sizes as a model's config names them. `metadata` has what only some architectures have."""

    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ff: int
    vocab: int
    context: int = 32768
    head: int = 0
    quant: str = "Q4_K_M"
    tied: bool = False
    bias: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_ff: int = 0
    shared_ff: int = 0
    dense_layers: int = 0
    window: int = 0
    fused: bool = False
    ssm: Mapping[str, int] = field(default_factory=dict)
    attention_every: int = 0
    metadata: Mapping[str, Item] = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        return self.head or self.width // max(self.heads, 1)

    @property
    def is_bert(self) -> bool:
        return self.arch in ("bert", "jina-bert-v2")

    def attends(self, layer: int) -> bool:
        """Whether the layer has attention and a cache; in most architectures all have."""
        return self.attention_every == 0 or (layer + 1) % self.attention_every == 0


_Layer = Callable[[Shape, int, Callable[..., None]], None]
"""Adds the tensors of a layer, named without "blk.N."."""


def _weights(add: Callable[..., None], **matrices: tuple[int, ...]) -> None:
    for name, dimensions in matrices.items():
        add(f"{name}.weight", *dimensions)


def norms(add: Callable[..., None], width: int, *names: str, bias: bool = False) -> None:
    for name in names:
        add(f"{name}.weight", width)
        if bias:
            add(f"{name}.bias", width)


def _attention(
    s: Shape, add: Callable[..., None], query: int = 1, heads: int | None = None
) -> None:
    """`query`: how often as wide as usual, where a gate is in it."""
    heads = s.heads if heads is None else heads
    wide, narrow = heads * s.head_size, s.kv_heads * s.head_size
    if s.fused:
        add("attn_qkv.weight", s.width, wide + 2 * narrow)
        if s.bias:
            add("attn_qkv.bias", wide + 2 * narrow)
    else:
        for name, size in (("attn_q", wide * query), ("attn_k", narrow), ("attn_v", narrow)):
            add(f"{name}.weight", s.width, size)
            if s.bias:
                add(f"{name}.bias", size)
    add("attn_output.weight", wide, s.width)


def _dense(s: Shape, add: Callable[..., None], *, gated: bool = True, bias: bool = False) -> None:
    if gated:
        add("ffn_gate.weight", s.width, s.ff)
    add("ffn_up.weight", s.width, s.ff)
    add("ffn_down.weight", s.ff, s.width)
    if bias:
        add("ffn_up.bias", s.ff)
        add("ffn_down.bias", s.width)


def _experts(s: Shape, add: Callable[..., None]) -> None:
    ff = s.expert_ff or s.ff
    add("ffn_gate_inp.weight", s.width, s.experts)
    _weights(
        add,
        ffn_gate_exps=(s.width, ff, s.experts),
        ffn_down_exps=(ff, s.width, s.experts),
        ffn_up_exps=(s.width, ff, s.experts),
    )
    if s.shared_ff:
        _weights(
            add,
            ffn_gate_shexp=(s.width, s.shared_ff),
            ffn_down_shexp=(s.shared_ff, s.width),
            ffn_up_shexp=(s.width, s.shared_ff),
        )


def _feed_forward(s: Shape, layer: int, add: Callable[..., None]) -> None:
    if s.experts and layer >= s.dense_layers:
        _experts(s, add)
    else:
        _dense(s, add)


def _scan(s: Shape, add: Callable[..., None], *, norm: bool = True) -> None:
    """A layer of Mamba 2."""
    inner, state, groups, heads = (s.ssm[name] for name in ("inner", "state", "groups", "heads"))
    convolved = inner + 2 * groups * state
    add("ssm_in.weight", s.width, inner + convolved + heads)
    add("ssm_conv1d.weight", s.ssm["conv"], convolved)
    add("ssm_conv1d.bias", convolved)
    add("ssm_dt.bias", heads)
    add("ssm_a", 1, heads)
    add("ssm_d", 1, heads)
    if norm:
        add("ssm_norm.weight", inner // groups, groups)
    add("ssm_out.weight", inner, s.width)


def _llama(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "ffn_norm")
    _attention(s, add)
    _feed_forward(s, layer, add)


def _qwen2moe(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    add("ffn_gate_inp_shexp.weight", s.width)


def _head_norms(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    norms(add, s.head_size, "attn_q_norm", "attn_k_norm")


def _wide_norms(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    add("attn_q_norm.weight", s.heads * s.head_size)
    add("attn_k_norm.weight", s.kv_heads * s.head_size)


def _post_norms_only(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _attention(s, add)
    norms(add, s.width, "post_attention_norm", "post_ffw_norm")
    widths = (s.heads, s.kv_heads) if s.arch == "olmo2" else (1, 1)
    add("attn_q_norm.weight", widths[0] * s.head_size)
    add("attn_k_norm.weight", widths[1] * s.head_size)
    _dense(s, add)


def _gemma(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    norms(add, s.width, "post_attention_norm", "post_ffw_norm")
    if s.arch != "gemma2":
        norms(add, s.head_size, "attn_q_norm", "attn_k_norm")


def _gemma3n(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _gemma(s, layer, add)
    each, streams, rank = 256, 4, 64
    _weights(
        add,
        inp_gate=(s.width, each),
        proj=(each, s.width),
        post_norm=(s.width,),
        altup_correct_coef=(streams, streams),
        altup_correct_scale=(s.width,),
        altup_predict_coef=(streams, streams * streams),
        altup_router=(s.width, streams),
        altup_router_norm=(s.width,),
        laurel_l=(s.width, rank),
        laurel_r=(rank, s.width),
        laurel_post_norm=(s.width,),
    )


def _up_and_gate_in_one(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "ffn_norm")
    _attention(s, add)
    add("ffn_up.weight", s.width, 2 * s.ff)
    add("ffn_down.weight", s.ff, s.width)
    if s.arch == "glm4":
        norms(add, s.width, "post_attention_norm", "post_ffw_norm")


def _glm4moe(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "post_attention_norm")
    _attention(s, add)
    _feed_forward(s, layer, add)
    if layer >= s.dense_layers:
        add("exp_probs_b.bias", s.experts)
    if layer == s.layers - 1:
        norms(add, s.width, "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")
        add("nextn.eh_proj.weight", 2 * s.width, s.width)


def _phi2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", bias=True)
    _attention(s, add)
    add("attn_output.bias", s.width)
    _dense(s, add, gated=False, bias=True)


def _starcoder2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "ffn_norm", bias=True)
    _attention(s, add)
    add("attn_output.bias", s.width)
    _dense(s, add, gated=False, bias=True)


def _stablelm(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "ffn_norm", bias=True)
    _attention(s, add)
    _dense(s, add)


def _cohere2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm")
    _attention(s, add)
    _dense(s, add)


def _minicpm3(s: Shape, layer: int, add: Callable[..., None]) -> None:
    query, latent, rope, value, key = 768, 256, 32, 64, 96
    norms(add, s.width, "attn_norm", "ffn_norm")
    _weights(
        add,
        attn_q_a_norm=(query,),
        attn_kv_a_norm=(latent,),
        attn_q_a=(s.width, query),
        attn_q_b=(query, s.heads * key),
        attn_kv_a_mqa=(s.width, latent + rope),
        attn_kv_b=(latent, s.heads * (key - rope + value)),
        attn_output=(s.heads * value, s.width),
    )
    _dense(s, add)


def _deepseek2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    latent, rope, plain, value = (_number(s, name) for name in ("latent", "rope", "plain", "value"))
    norms(add, s.width, "attn_norm", "ffn_norm")
    _weights(
        add,
        attn_q=(s.width, s.heads * (plain + rope)),
        attn_kv_a_mqa=(s.width, latent + rope),
        attn_kv_a_norm=(latent,),
    )
    if s.kv_heads == 1:
        _weights(add, attn_k_b=(plain, latent, s.heads), attn_v_b=(latent, value, s.heads))
    else:
        _weights(add, attn_kv_b=(latent, s.heads * (plain + value)))
    add("attn_output.weight", s.heads * value, s.width)
    _feed_forward(s, layer, add)


def _number(s: Shape, name: str) -> int:
    return int(s.ssm[name])


def _bert(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _attention(s, add)
    add("attn_output.bias", s.width)
    norms(add, s.width, "attn_output_norm", "layer_output_norm", bias=True)
    _dense(s, add, gated=s.arch == "jina-bert-v2", bias=s.arch != "jina-bert-v2")
    if s.arch == "jina-bert-v2":
        add("ffn_down.bias", s.width)


def _mamba(s: Shape, layer: int, add: Callable[..., None]) -> None:
    inner, state, rank = s.ssm["inner"], s.ssm["state"], s.ssm["heads"]
    norms(add, s.width, "attn_norm")
    add("ssm_in.weight", s.width, 2 * inner)
    add("ssm_conv1d.weight", s.ssm["conv"], inner)
    add("ssm_conv1d.bias", inner)
    add("ssm_x.weight", inner, rank + 2 * state)
    add("ssm_dt.weight", rank, inner)
    add("ssm_dt.bias", inner)
    add("ssm_a", state, inner)
    add("ssm_d", inner)
    add("ssm_out.weight", inner, s.width)


def _mamba2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm")
    _scan(s, add)


def _falcon_h1(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm")
    add("ffn_norm", s.width)
    _scan(s, add, norm=False)
    _attention(s, add)
    _dense(s, add)


def _granite_hybrid(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "ffn_norm")
    if s.attends(layer):
        _attention(s, add)
    else:
        _scan(s, add)
    _feed_forward(s, layer, add)


def _lfm2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    norms(add, s.width, "attn_norm", "ffn_norm")
    if s.attends(layer):
        _attention(s, add)
        norms(add, s.head_size, "attn_q_norm", "attn_k_norm")
    else:
        add("shortconv.conv.weight", 3, s.width)
        add("shortconv.in_proj.weight", s.width, 3 * s.width)
        add("shortconv.out_proj.weight", s.width, s.width)
    _feed_forward(s, layer, add)
    if s.experts and layer >= s.dense_layers:
        add("exp_probs_b.bias", s.experts)


def _delta_net(s: Shape, layer: int, add: Callable[..., None]) -> None:
    """Qwen 3 Next and 3.5: linear attention, and full attention each fourth layer."""
    norms(add, s.width, "attn_norm", "post_attention_norm")
    if s.attends(layer):
        _attention(s, add, query=2)
        norms(add, s.head_size, "attn_q_norm", "attn_k_norm")
    else:
        state, heads, groups = s.ssm["state"], s.ssm["heads"], s.ssm["groups"]
        keys, values = state * groups, state * heads
        add("attn_qkv.weight", s.width, 2 * keys + values)
        add("attn_gate.weight", s.width, values)
        add("ssm_conv1d.weight", s.ssm["conv"], 2 * keys + values)
        add("ssm_dt.bias", heads)
        add("ssm_a", heads)
        if s.arch == "qwen3next":
            add("ssm_ba.weight", s.width, 2 * heads)
        else:
            add("ssm_beta.weight", s.width, heads)
            add("ssm_alpha.weight", s.width, heads)
        add("ssm_norm.weight", state)
        add("ssm_out.weight", values, s.width)
    _feed_forward(s, layer, add)
    if s.experts:
        add("ffn_gate_inp_shexp.weight", s.width)


LAYERS: dict[str, _Layer] = {
    "llama": _llama, "qwen2": _llama, "smollm3": _llama, "internlm2": _llama, "mistral3": _llama,
    "granite": _llama, "granitemoe": _llama, "qwen2moe": _qwen2moe, "qwen3": _head_norms,
    "olmoe": _wide_norms, "olmo2": _post_norms_only, "exaone4": _post_norms_only,
    "gemma2": _gemma, "gemma3": _gemma, "gemma3n": _gemma3n,
    "phi3": _up_and_gate_in_one, "glm4": _up_and_gate_in_one, "glm4moe": _glm4moe, "phi2": _phi2,
    "starcoder2": _starcoder2, "stablelm": _stablelm, "cohere2": _cohere2, "minicpm3": _minicpm3,
    "deepseek2": _deepseek2, "bert": _bert, "jina-bert-v2": _bert,
    "mamba": _mamba, "mamba2": _mamba2, "falcon-h1": _falcon_h1, "granitehybrid": _granite_hybrid,
    "lfm2": _lfm2, "lfm2moe": _lfm2, "qwen3next": _delta_net, "qwen35": _delta_net,
}  # fmt: skip
