"""Qwen2.5 models as sparse files: names, shapes and types of the real Q4_K_M ones, and no data."""

from dataclasses import dataclass
from pathlib import Path

from tests.gguf_files import Entry, Item, write_sparse

F32, Q4_K, Q6_K = 0, 12, 14


@dataclass(frozen=True)
class Qwen:
    """The dimensions of one size of the model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int = 151936
    is_tied: bool = True


QWEN_3B = Qwen(36, 2048, 16, 2, 11008)
QWEN_7B = Qwen(28, 3584, 28, 4, 18944, 152064, is_tied=False)
TINY = Qwen(2, 256, 4, 2, 512, 1000)


def write_qwen(path: Path, size: Qwen, *, architecture: str = "qwen2") -> Path:
    """Write the file. Its vocabulary has the right length, of words that mean nothing."""
    return write_sparse(path, _metadata(size, architecture), tuple(_tensors(size)))


def _metadata(size: Qwen, architecture: str) -> dict[str, Item]:
    numbers = {
        "context_length": 32768,
        "embedding_length": size.width,
        "block_count": size.layers,
        "feed_forward_length": size.feed_forward,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.kv_heads,
    }
    return {
        "general.architecture": ("string", architecture),
        "general.type": ("string", "model"),
        **{f"{architecture}.{key}": ("u32", value) for key, value in numbers.items()},
        f"{architecture}.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "tokenizer.ggml.tokens": ("string[]", [f"<t{n}>" for n in range(size.vocabulary)]),
        "general.quantization_version": ("u32", 2),
    }


def _tensors(size: Qwen) -> list[Entry]:
    width, feed_forward = size.width, size.feed_forward
    kv_width = width // size.heads * size.kv_heads
    embedding = (width, size.vocabulary)
    found: list[Entry] = [
        ("token_embd.weight", embedding, Q6_K if size.is_tied else Q4_K),
        ("output_norm.weight", (width,), F32),
    ]
    if not size.is_tied:
        found.append(("output.weight", embedding, Q6_K))
    for layer in range(size.layers):
        better = Q6_K if _has_more_bits(layer, size.layers) else Q4_K
        block: tuple[Entry, ...] = (
            ("attn_norm.weight", (width,), F32),
            ("attn_q.weight", (width, width), Q4_K),
            ("attn_k.weight", (width, kv_width), Q4_K),
            ("attn_v.weight", (width, kv_width), better),
            ("attn_output.weight", (width, width), Q4_K),
            ("attn_q.bias", (width,), F32),
            ("attn_k.bias", (kv_width,), F32),
            ("attn_v.bias", (kv_width,), F32),
            ("ffn_norm.weight", (width,), F32),
            ("ffn_gate.weight", (width, feed_forward), Q4_K),
            ("ffn_up.weight", (width, feed_forward), Q4_K),
            ("ffn_down.weight", (feed_forward, width), better),
        )
        found += [(f"blk.{layer}.{name}", shape, kind) for name, shape, kind in block]
    return found


def _has_more_bits(layer: int, layers: int) -> bool:
    """Which layers llama-quantize gives Q6_K in a Q4_K_M file."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
