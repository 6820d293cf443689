"""Headers of models by their shape: the tensors that llama.cpp wants of each architecture.

A `Shape` is a few numbers of a model's config; `header` tells the metadata and the tensors of its
GGUF, which tests/gguf_files.py writes, whole or sparse. The vocabulary is of the right length and
of no use. Types of tensors follow what llama-quantize does, roughly: output and embeddings, and
some of the values and down projections, are kept better than the rest.
"""

from typing import Any

from llmsup.core.ggml import TYPES
from tests.gguf_files import Entry, Item
from tests.unseen_layers import LAYERS, Shape, norms

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
_HAS_LAYER_NORM = ("bert", "jina-bert-v2", "phi2", "starcoder2", "stablelm", "cohere2")


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


def header(shape: Shape) -> tuple[dict[str, Item], list[Entry]]:
    """The metadata and the tensors, as tests/gguf_files.py takes them."""
    tensors = _Tensors(shape)
    add = tensors.add
    add("token_embd.weight", shape.width, shape.vocab)
    if shape.is_bert:
        if shape.arch == "bert":
            add("position_embd.weight", shape.width, shape.context)
        add("token_types.weight", shape.width, 2)
        norms(add, shape.width, "token_embd_norm", bias=True)
    else:
        norm = "token_embd_norm" if shape.arch.startswith("lfm2") else "output_norm"
        with_bias = shape.arch in ("phi2", "starcoder2", "stablelm")
        norms(add, shape.width, norm, bias=with_bias)
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
        LAYERS[shape.arch](
            shape, layer, lambda name, *sizes, at=layer: add(f"blk.{at}.{name}", *sizes)
        )
    return {**_metadata(shape), **_vocabulary(shape)}, tensors.entries


def _metadata(s: Shape) -> dict[str, Item]:
    kv_heads: Item = ("u32", s.kv_heads)
    if s.attention_every and s.arch not in ("qwen3next", "qwen35"):
        each = [s.kv_heads if s.attends(layer) else 0 for layer in range(s.layers)]
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
