"""Headers of models by their shape: the tensors that llama.cpp wants of each architecture.

A `Shape` is a few numbers of a model's config; `header` tells the metadata and the tensors of its
GGUF, which tests/gguf_files.py writes, whole or sparse. The vocabulary is of the right length and
of no use. Types of tensors follow what llama-quantize does, roughly: output and embeddings, and
some of the values and down projections, are kept better than the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmsup.core.ggml import TYPES
from tests.gguf_files import Entry, Item

_IDS = {known.name: number for number, known in TYPES.items()}
_MIXES = {
    # the mix: (most matrices, output or tied embeddings, the better part of values and downs)
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K"),
    "Q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "IQ4_XS": ("IQ4_XS", "Q6_K", "Q5_K"),
    "F16": ("F16", "F16", "F16"),
}
_WHERE_ROWS_ARE_ODD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_ALWAYS_F32 = (
    *("_norm", "norm.", "rope_", "ffn_gate_inp", "position_embd", "token_types"),
    *("ssm_conv1d", "ssm_a", "ssm_d", "altup_", "shortconv.conv"),
)


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
        return self.arch in _IS_BERT


class _Tensors:
    """The tensors so far, and the rule by which each gets its type."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.entries: list[Entry] = []
        self._most, self._output, self._better = _MIXES[shape.quant]
        self._values = 0

    def add(self, name: str, *dimensions: int) -> None:
        self.entries.append((name, dimensions, _IDS[self._type(name, dimensions)]))

    def _type(self, name: str, dimensions: tuple[int, ...]) -> str:
        bare = len(dimensions) == 1 or name.endswith(".bias")
        if bare or any(part in name for part in _ALWAYS_F32):
            return "F32"
        chosen = self._most
        if name == "output.weight" or (name == "token_embd.weight" and self.shape.tied):
            chosen = self._output
        elif "attn_v." in name or "attn_qkv" in name:
            chosen = self._better if self._is_better(self._values) else self._most
            self._values += 1
        elif "ffn_down" in name and self._is_better(int(name.split(".")[1])):
            chosen = self._better
        if dimensions[0] % TYPES[_IDS[chosen]].block:
            chosen = _WHERE_ROWS_ARE_ODD.get(chosen, "F16")
        return "F16" if dimensions[0] % TYPES[_IDS[chosen]].block else chosen

    def _is_better(self, layer: int) -> bool:
        eighth = self.shape.layers // 8
        return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


_Layer = Callable[[Shape, int, Callable[..., None]], None]
"""Adds the tensors of a layer, named without "blk.N."."""


def _weights(add: Callable[..., None], **matrices: tuple[int, ...]) -> None:
    for name, dimensions in matrices.items():
        add(f"{name}.weight", *dimensions)


def _norms(add: Callable[..., None], width: int, *names: str, bias: bool = False) -> None:
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
    _norms(add, s.width, "attn_norm", "ffn_norm")
    _attention(s, add)
    _feed_forward(s, layer, add)


def _qwen2moe(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    add("ffn_gate_inp_shexp.weight", s.width)


def _head_norms(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    _norms(add, s.head_size, "attn_q_norm", "attn_k_norm")


def _wide_norms(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    add("attn_q_norm.weight", s.heads * s.head_size)
    add("attn_k_norm.weight", s.kv_heads * s.head_size)


def _post_norms_only(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _attention(s, add)
    _norms(add, s.width, "post_attention_norm", "post_ffw_norm")
    widths = (s.heads, s.kv_heads) if s.arch == "olmo2" else (1, 1)
    add("attn_q_norm.weight", widths[0] * s.head_size)
    add("attn_k_norm.weight", widths[1] * s.head_size)
    _dense(s, add)


def _gemma(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _llama(s, layer, add)
    _norms(add, s.width, "post_attention_norm", "post_ffw_norm")
    if s.arch != "gemma2":
        _norms(add, s.head_size, "attn_q_norm", "attn_k_norm")


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
    _norms(add, s.width, "attn_norm", "ffn_norm")
    _attention(s, add)
    add("ffn_up.weight", s.width, 2 * s.ff)
    add("ffn_down.weight", s.ff, s.width)
    if s.arch == "glm4":
        _norms(add, s.width, "post_attention_norm", "post_ffw_norm")


def _glm4moe(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm", "post_attention_norm")
    _attention(s, add)
    _feed_forward(s, layer, add)
    if layer >= s.dense_layers:
        add("exp_probs_b.bias", s.experts)
    if layer == s.layers - 1:
        _norms(add, s.width, "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")
        add("nextn.eh_proj.weight", 2 * s.width, s.width)


def _phi2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm", bias=True)
    _attention(s, add)
    add("attn_output.bias", s.width)
    _dense(s, add, gated=False, bias=True)


def _starcoder2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm", "ffn_norm", bias=True)
    _attention(s, add)
    add("attn_output.bias", s.width)
    _dense(s, add, gated=False, bias=True)


def _stablelm(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm", "ffn_norm", bias=True)
    _attention(s, add)
    _dense(s, add)


def _cohere2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm")
    _attention(s, add)
    _dense(s, add)


def _minicpm3(s: Shape, layer: int, add: Callable[..., None]) -> None:
    query, latent, rope, value, key = 768, 256, 32, 64, 96
    _norms(add, s.width, "attn_norm", "ffn_norm")
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
    _norms(add, s.width, "attn_norm", "ffn_norm")
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
    _norms(add, s.width, "attn_output_norm", "layer_output_norm", bias=True)
    _dense(s, add, gated=s.arch == "jina-bert-v2", bias=s.arch != "jina-bert-v2")
    if s.arch == "jina-bert-v2":
        add("ffn_down.bias", s.width)


def _mamba(s: Shape, layer: int, add: Callable[..., None]) -> None:
    inner, state, rank = s.ssm["inner"], s.ssm["state"], s.ssm["heads"]
    _norms(add, s.width, "attn_norm")
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
    _norms(add, s.width, "attn_norm")
    _scan(s, add)


def _falcon_h1(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm")
    add("ffn_norm", s.width)
    _scan(s, add, norm=False)
    _attention(s, add)
    _dense(s, add)


def _attends(s: Shape, layer: int) -> bool:
    return (layer + 1) % s.attention_every == 0


def _granite_hybrid(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm", "ffn_norm")
    if _attends(s, layer):
        _attention(s, add)
    else:
        _scan(s, add)
    _feed_forward(s, layer, add)


def _lfm2(s: Shape, layer: int, add: Callable[..., None]) -> None:
    _norms(add, s.width, "attn_norm", "ffn_norm")
    if _attends(s, layer):
        _attention(s, add)
        _norms(add, s.head_size, "attn_q_norm", "attn_k_norm")
    else:
        add("shortconv.conv.weight", 3, s.width)
        add("shortconv.in_proj.weight", s.width, 3 * s.width)
        add("shortconv.out_proj.weight", s.width, s.width)
    _feed_forward(s, layer, add)
    if s.experts and layer >= s.dense_layers:
        add("exp_probs_b.bias", s.experts)


def _delta_net(s: Shape, layer: int, add: Callable[..., None]) -> None:
    """Qwen 3 Next and 3.5: linear attention, and full attention each fourth layer."""
    _norms(add, s.width, "attn_norm", "post_attention_norm")
    if _attends(s, layer):
        _attention(s, add, query=2)
        _norms(add, s.head_size, "attn_q_norm", "attn_k_norm")
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


_LAYERS: dict[str, _Layer] = {
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
_IS_BERT = ("bert", "jina-bert-v2")
_HAS_LAYER_NORM = (*_IS_BERT, "phi2", "starcoder2", "stablelm", "cohere2")


def header(shape: Shape) -> tuple[dict[str, Item], list[Entry]]:
    """The metadata and the tensors, as tests/gguf_files.py takes them."""
    tensors = _Tensors(shape)
    add = tensors.add
    add("token_embd.weight", shape.width, shape.vocab)
    if shape.is_bert:
        if shape.arch == "bert":
            add("position_embd.weight", shape.width, shape.context)
        add("token_types.weight", shape.width, 2)
        _norms(add, shape.width, "token_embd_norm", bias=True)
    else:
        norm = "token_embd_norm" if shape.arch.startswith("lfm2") else "output_norm"
        with_bias = shape.arch in ("phi2", "starcoder2", "stablelm")
        _norms(add, shape.width, norm, bias=with_bias)
        if not shape.tied:
            add("output.weight", shape.width, shape.vocab)
        if shape.arch == "phi2":
            add("output.bias", shape.vocab)
    if shape.arch == "gemma3n":
        add("altup_proj.weight", shape.width, shape.width, 3)
        add("altup_unembd_proj.weight", shape.width, shape.width, 3)
        add("per_layer_token_embd.weight", 256 * shape.layers, shape.vocab)
        add("per_layer_model_proj.weight", shape.width, 256 * shape.layers)
        add("per_layer_proj_norm.weight", 256)
    for layer in range(shape.layers):
        _LAYERS[shape.arch](
            shape, layer, lambda name, *sizes, at=layer: add(f"blk.{at}.{name}", *sizes)
        )
    return {**_metadata(shape), **_vocabulary(shape)}, tensors.entries


def _metadata(s: Shape) -> dict[str, Item]:
    kv_heads: Item = ("u32", s.kv_heads)
    if s.attention_every and s.arch not in ("qwen3next", "qwen35"):
        each = [s.kv_heads if _attends(s, layer) else 0 for layer in range(s.layers)]
        kv_heads = ("i32[]", each)
    said: dict[str, Item] = {
        "context_length": ("u32", s.context),
        "embedding_length": ("u32", s.width),
        "block_count": ("u32", s.layers),
        "feed_forward_length": ("u32", s.ff),
        "attention.head_count": ("u32", s.heads),
        "attention.head_count_kv": kv_heads,
    }
    epsilon = "attention.layer_norm_epsilon" if s.arch in _HAS_LAYER_NORM else None
    said[epsilon or "attention.layer_norm_rms_epsilon"] = ("f32", 1e-6)
    if s.head:
        said |= {"attention.key_length": ("u32", s.head), "attention.value_length": ("u32", s.head)}
    if s.window:
        said["attention.sliding_window"] = ("u32", s.window)
    if s.experts:
        said |= {"expert_count": ("u32", s.experts), "expert_used_count": ("u32", s.experts_used)}
        if s.expert_ff:
            said["expert_feed_forward_length"] = ("u32", s.expert_ff)
        if s.shared_ff:
            said["expert_shared_feed_forward_length"] = ("u32", s.shared_ff)
        if s.dense_layers:
            said["leading_dense_block_count"] = ("u32", s.dense_layers)
    names = {
        "conv": "conv_kernel",
        "inner": "inner_size",
        "state": "state_size",
        "heads": "time_step_rank",
        "groups": "group_count",
    }
    said |= {f"ssm.{names[key]}": ("u32", size) for key, size in s.ssm.items() if key in names}
    if s.is_bert:
        said |= {"attention.causal": ("bool", False), "pooling_type": ("u32", 1)}
    said |= s.metadata
    general: dict[str, Item] = {
        "general.architecture": ("string", s.arch),
        "general.type": ("string", "model"),
        "general.quantization_version": ("u32", 2),
    }
    return general | {f"{s.arch}.{key}": item for key, item in said.items()}


def _vocabulary(s: Shape) -> dict[str, Item]:
    tokens, kinds = [f"<t{number}>" for number in range(s.vocab)], [1] * s.vocab
    if s.is_bert:
        tokens = [f"\u2581t{number}" for number in range(s.vocab)]
        tokens[:5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        special = {
            "bos": 2,
            "eos": 3,
            "unknown": 1,
            "seperator": 3,
            "padding": 0,
            "cls": 2,
            "mask": 4,
        }
        kind: dict[str, Any] = {
            "model": ("string", "bert"),
            "token_type_count": ("u32", 2),
            **{f"{name}_token_id": ("u32", number) for name, number in special.items()},
        }
    else:
        tokens[:3], kinds[:3] = ["<unk>", "<s>", "</s>"], [2, 3, 3]
        tokens[3:259], kinds[3:259] = [f"<0x{byte:02X}>" for byte in range(256)], [6] * 256
        kind = {
            "model": ("string", "llama"),
            "scores": ("f32[]", [-float(number) for number in range(s.vocab)]),
            "bos_token_id": ("u32", 1),
            "eos_token_id": ("u32", 2),
        }
    kind |= {"tokens": ("string[]", tokens), "token_type": ("i32[]", kinds)}
    return {f"tokenizer.ggml.{key}": item for key, item in kind.items()}
