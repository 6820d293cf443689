"""Models as they are published, without their data: metadata, names, shapes and types of tensors.

The headers are made as llama.cpp's converter writes them, but for the vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

from llmsup.core.ggml import TYPES
from llmsup.core.gguf import Model
from llmsup.core.gguf_header import parse
from tests.gguf_files import Entry, Item, header
from tests.unseen_models import MODELS
from tests.unseen_shapes import header as unseen_header

TYPE_IDS = {known.name: type_id for type_id, known in TYPES.items()}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_KINDS = {bool: "bool", int: "u32", float: "f32", str: "string"}

_TABLE = """
    qwen2.5-0.5b qwen2 L=24 E=896 H=14 KV=2 FF=4864 V=151936 tied=1 bias=1
    qwen2.5-1.5b qwen2 L=28 E=1536 H=12 KV=2 FF=8960 V=151936 tied=1 bias=1
    qwen2.5-3b qwen2 L=36 E=2048 H=16 KV=2 FF=11008 V=151936 tied=1 bias=1
    qwen2.5-7b qwen2 L=28 E=3584 H=28 KV=4 FF=18944 V=152064 bias=1
    llama-3.1-8b llama L=32 E=4096 H=32 KV=8 FF=14336 V=128256 ropef=1
    llama-3.2-1b llama L=16 E=2048 H=32 KV=8 D=64 FF=8192 V=128256 tied=1 ropef=1
    llama-3.2-3b llama L=28 E=3072 H=24 KV=8 D=128 FF=8192 V=128256 tied=1 ropef=1
    mistral-7b llama L=32 E=4096 H=32 KV=8 FF=14336 V=32768
    gemma-3-1b gemma3 L=26 E=1152 H=4 KV=1 D=256 FF=6912 V=262144 tied=1 swa=512
    gemma-3-4b gemma3 L=34 E=2560 H=8 KV=4 D=256 FF=10240 V=262208 tied=1 swa=1024
    phi-3.5-mini phi3 L=32 E=3072 H=32 KV=32 D=96 FF=8192 V=32064 longrope=1
    phi-4-mini phi3 L=32 E=3072 H=24 KV=8 D=128 FF=8192 V=200064 tied=1 longrope=1 nrot=96
    qwen3-0.6b qwen3 L=28 E=1024 H=16 KV=8 D=128 FF=3072 V=151936 tied=1
    qwen3-4b qwen3 L=36 E=2560 H=32 KV=8 D=128 FF=9728 V=151936 tied=1
    qwen3-8b qwen3 L=36 E=4096 H=32 KV=8 D=128 FF=12288 V=151936
    qwen3-30b-a3b qwen3moe L=48 E=2048 H=32 KV=4 D=128 FF=6144 V=151936 X=128 XU=8 XFF=768
    gpt-oss-20b gpt-oss L=24 E=2880 H=64 KV=8 D=64 FF=2880 V=201088 X=32 XU=4 XFF=2880 swa=128 \
        mix=MXFP4
    ds-v2-lite deepseek2 L=27 E=2048 H=16 KV=1 FF=10944 V=102400 X=64 XU=6 XFF=1408 XS=2 \
        kvl=512 rope=64 nope=128 vdim=128
    bge-large bert L=24 E=1024 H=16 KV=16 FF=4096 V=30522 CT=512 mix=F16
    nomic-v1.5 nomic-bert L=12 E=768 H=12 KV=12 FF=3072 V=30522 CT=2048 mix=Q8_0
"""


def _row(line: str) -> tuple[str, dict[str, Any]]:
    name, arch, *words = line.split()
    values = dict(word.split("=") for word in words)
    numbers = {key: int(each) if each.isdigit() else each for key, each in values.items()}
    return name, {"arch": arch, **numbers}


PUBLISHED = dict(_row(line) for line in _TABLE.strip().splitlines())
"""By name: architecture, layers, embedding, heads, heads of keys, feed-forward, vocabulary, more.

`tied`: no output matrix; D: the length of a head; X, XU, XFF, XS: experts, those used, their
feed-forward, shared ones; `swa`: a sliding window; `mix`: the quantisation, else Q4_K_M.
"""


@dataclass
class _Maker:
    """Collects tensors, and picks their types as a Q4_K_M quantisation does."""

    layers: int
    mix: str
    is_tied: bool
    tensors: list[Entry] = field(default_factory=list)
    values_made: int = 0

    def _is_better(self, number: int) -> bool:
        eighth = self.layers // 8
        return number < eighth or number >= 7 * self.layers // 8 or (number - eighth) % 3 == 2

    def add(self, name: str, shape: tuple[int, ...], role: str = "", layer: int = 0) -> None:
        kind = self._type(name, shape, role, layer)
        if shape[0] % TYPES[TYPE_IDS[kind]].block:
            kind = _FALLBACK.get(kind, "F16")
        self.tensors.append((name, shape, TYPE_IDS[kind]))

    def _type(self, name: str, shape: tuple[int, ...], role: str, layer: int) -> str:
        plain = ("bias", "_norm", "rope_", "sinks", "ffn_gate_inp", "position_embd", "token_types")
        if len(shape) == 1 or any(word in name for word in plain):
            return "F32"
        if self.mix in ("F16", "Q8_0"):
            return self.mix
        if self.mix == "MXFP4":
            return "MXFP4" if "_exps" in name else "Q8_0"
        if role == "output" or (role == "embedding" and self.is_tied):
            return "Q6_K"
        if role == "value":
            self.values_made += 1
            return "Q6_K" if self._is_better(self.values_made - 1) else "Q4_K"
        return "Q6_K" if role == "down" and self._is_better(layer) else "Q4_K"


def published(name: str) -> Model:
    """The model of that name in the table above."""
    row = PUBLISHED[name]
    maker = _Maker(row["L"], row.get("mix", "Q4_K_M"), bool(row.get("tied")))
    _outer(maker, row)
    for number in range(row["L"]):
        _block(maker, row, number)
    return model_of(_metadata(row), maker.tensors)


def unseen(name: str) -> Model:
    """The model of that name in tests/unseen_models.py."""
    items, tensors = unseen_header(MODELS[name])
    kept = {key: item for key, item in items.items() if not key.startswith("tokenizer.")}
    return _read(kept, tensors)


def model_of(metadata: dict[str, Any], tensors: list[Entry]) -> Model:
    """A model of plain values; its header is really written, and really read."""
    items: dict[str, Item] = {}
    for key, value in metadata.items():
        if isinstance(value, list):
            items[key] = (_KINDS[type(value[0])] + "[]", value)
        else:
            items[key] = (_KINDS[type(value)], value)
    return _read(items, tensors)


def _read(items: dict[str, Item], tensors: list[Entry]) -> Model:
    written, data_bytes = header(items, tensors)
    parsed = parse(written, len(written) + data_bytes)
    assert parsed is not None
    return Model((parsed,))


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    arch, length = row["arch"], row.get("D")
    values: dict[str, Any] = {
        "context_length": row.get("CT", 32768),
        "embedding_length": row["E"],
        "block_count": row["L"],
        "feed_forward_length": row["FF"],
        "attention.head_count": row["H"],
        "attention.head_count_kv": row["KV"],
    }
    if length and arch != "deepseek2":
        values |= {"attention.key_length": length, "attention.value_length": length}
    if row.get("swa"):
        values["attention.sliding_window"] = row["swa"]
    if row.get("nrot"):
        values["rope.dimension_count"] = row["nrot"]
    if row.get("X"):
        values |= {
            "expert_count": row["X"],
            "expert_used_count": row["XU"],
            "expert_feed_forward_length": row["XFF"],
        }
    if arch in ("bert", "nomic-bert"):
        values |= {"attention.causal": False, "pooling_type": 2 if arch == "bert" else 1}
    if arch == "deepseek2":
        rank, rope, nope = row["kvl"], row["rope"], row["nope"]
        values |= {
            "attention.kv_lora_rank": rank,
            "attention.key_length": rank + rope,
            "attention.value_length": rank,
            "attention.key_length_mla": nope + rope,
            "attention.value_length_mla": row["vdim"],
            "rope.dimension_count": rope,
            "leading_dense_block_count": 1,
            "expert_shared_count": row["XS"],
            "expert_weights_scale": 1.0,
        }
    return {"general.architecture": arch} | {f"{arch}.{key}": each for key, each in values.items()}


def _outer(maker: _Maker, row: dict[str, Any]) -> None:
    width, length = row["E"], row.get("D", row["E"] // row["H"])
    maker.add("token_embd.weight", (width, row["V"]), "embedding")
    if "bert" in row["arch"]:
        if row["arch"] == "bert":
            maker.add("position_embd.weight", (width, row["CT"]))
        maker.add("token_types.weight", (width, 2))
        maker.add("token_embd_norm.weight", (width,))
        maker.add("token_embd_norm.bias", (width,))
    else:
        maker.add("output_norm.weight", (width,))
        if not row.get("tied"):
            maker.add("output.weight", (width, row["V"]), "output")
    if row.get("ropef"):
        maker.add("rope_freqs.weight", (length // 2,))
    if row.get("longrope"):
        for name in ("long", "short"):
            maker.add(f"rope_factors_{name}.weight", (row.get("nrot", length) // 2,))


def _block(maker: _Maker, row: dict[str, Any], number: int) -> None:
    arch, width, heads, kv_heads = row["arch"], row["E"], row["H"], row["KV"]
    is_bert = "bert" in arch

    def add(name: str, shape: tuple[int, ...], role: str = "") -> None:
        maker.add(f"blk.{number}.{name}", shape, role, number)

    if not is_bert:
        add("attn_norm.weight", (width,))
    _attention(add, row)
    if row.get("bias") or arch in ("gpt-oss", "bert"):
        length = row.get("D", width // heads)
        add("attn_q.bias", (heads * length,))
        add("attn_k.bias", (kv_heads * length,))
        add("attn_v.bias", (kv_heads * length,))
    if arch in ("gpt-oss", "bert"):
        add("attn_output.bias", (width,))
    if arch in ("qwen3", "qwen3moe", "gemma3"):
        add("attn_q_norm.weight", (row["D"],))
        add("attn_k_norm.weight", (row["D"],))
    if arch == "gpt-oss":
        add("attn_sinks.weight", (heads,))
        add("post_attention_norm.weight", (width,))
    if arch == "gemma3":
        add("post_attention_norm.weight", (width,))
        add("post_ffw_norm.weight", (width,))
    if is_bert:
        for name in ("attn_output_norm", "layer_output_norm"):
            add(f"{name}.weight", (width,))
            add(f"{name}.bias", (width,))
    elif arch != "gpt-oss":
        add("ffn_norm.weight", (width,))
    _feed_forward(add, row, is_dense=arch == "deepseek2" and number == 0)


def _attention(add: Any, row: dict[str, Any]) -> None:
    arch, width, heads, kv_heads = row["arch"], row["E"], row["H"], row["KV"]
    length = row.get("D", width // heads)
    if arch == "deepseek2":
        rank, rope, nope, value = row["kvl"], row["rope"], row["nope"], row["vdim"]
        add("attn_q.weight", (width, heads * (nope + rope)))
        add("attn_kv_a_mqa.weight", (width, rank + rope))
        add("attn_kv_a_norm.weight", (rank,))
        add("attn_k_b.weight", (nope, rank, heads))
        add("attn_v_b.weight", (rank, value, heads), "value")
        add("attn_output.weight", (heads * value, width))
        return
    if arch in ("phi3", "nomic-bert"):
        add("attn_qkv.weight", (width, (heads + 2 * kv_heads) * length), "value")
    else:
        add("attn_q.weight", (width, heads * length))
        add("attn_k.weight", (width, kv_heads * length))
        add("attn_v.weight", (width, kv_heads * length), "value")
    add("attn_output.weight", (heads * length, width))


def _feed_forward(add: Any, row: dict[str, Any], *, is_dense: bool) -> None:
    arch, width, inner, experts = row["arch"], row["E"], row["FF"], row.get("X", 0)
    if experts and not is_dense:
        inner = row["XFF"]
        add("ffn_gate_inp.weight", (width, experts))
        add("ffn_gate_exps.weight", (width, inner, experts))
        add("ffn_down_exps.weight", (inner, width, experts), "down")
        add("ffn_up_exps.weight", (width, inner, experts))
        if arch == "gpt-oss":
            add("ffn_gate_inp.bias", (experts,))
            add("ffn_gate_exps.bias", (inner, experts))
            add("ffn_down_exps.bias", (width, experts))
            add("ffn_up_exps.bias", (inner, experts))
        if row.get("XS"):
            add("ffn_gate_shexp.weight", (width, inner * row["XS"]))
            add("ffn_down_shexp.weight", (inner * row["XS"], width), "down")
            add("ffn_up_shexp.weight", (width, inner * row["XS"]))
        return
    if arch == "phi3":
        add("ffn_up.weight", (width, 2 * inner))
        add("ffn_down.weight", (inner, width), "down")
        return
    if arch != "bert":
        add("ffn_gate.weight", (width, inner))
    add("ffn_up.weight", (width, inner))
    add("ffn_down.weight", (inner, width), "down")
    if arch == "bert":
        add("ffn_up.bias", (inner,))
        add("ffn_down.bias", (width,))
