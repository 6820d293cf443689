"""GGUF files for tests, byte by byte, good ones and such that no writer would make."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsup.core.ggml import TYPES, size_bytes

KINDS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
"""The numbers: their ids in the file, and how `struct` packs them."""

Item = tuple[str, Any]
"""A kind and a value: ("u32", 7), ("string", "llama"), ("string[]", ["a", "b"])."""
Entry = tuple[str, tuple[int, ...], int]
"""A tensor: its name, its shape and the id of its type."""

SMALL: dict[str, Item] = {
    "general.architecture": ("string", "llama"),
    "llama.block_count": ("u32", 2),
    "llama.rope.freq_base": ("f32", 10000.0),
    "llama.attention.head_count_kv": ("i32[]", [2, 2]),
    "general.tags": ("string[]", ["chat", "small"]),
    "tokenizer.ggml.tokens": ("string[]", [f"<t{number}>" for number in range(100)]),
    "tokenizer.ggml.scores": ("f32[]", [-float(number) for number in range(100)]),
    "tokenizer.ggml.add_bos_token": ("bool", True),
    "general.quantization_version": ("u32", 2),
}
TENSORS: tuple[Entry, ...] = (
    ("token_embd.weight", (256, 100), 12),
    ("blk.0.attn_norm.weight", (256,), 0),
    ("blk.0.ffn_up.weight", (256, 3), 14),
    ("output_norm.weight", (256,), 0),
)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Item) -> bytes:
    """A value with the id of its kind in front."""
    kind, content = item
    if kind == "raw":
        return bytes(content)
    if kind == "string":
        return struct.pack("<I", 8) + string(content)
    if not kind.endswith("[]"):
        number, code = KINDS[kind]
        return struct.pack(f"<I{code}", number, content)
    return struct.pack("<I", 9) + _array(kind.removesuffix("[]"), content)


def _array(kind: str, content: Sequence[Any]) -> bytes:
    if kind == "string":
        return struct.pack("<IQ", 8, len(content)) + b"".join(map(string, content))
    if kind.endswith("[]"):
        inner = b"".join(_array(kind.removesuffix("[]"), each) for each in content)
        return struct.pack("<IQ", 9, len(content)) + inner
    number, code = KINDS[kind]
    return struct.pack(f"<IQ{len(content)}{code}", number, len(content), *content)


def entry(name: str | bytes, shape: Sequence[int], type_id: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", type_id, offset)


def header(
    metadata: Mapping[str, Item] = SMALL,
    tensors: Sequence[Entry] = TENSORS,
    *,
    version: int = 3,
    alignment: int = 32,
) -> tuple[bytes, int]:
    """The header with its padding, and how many bytes of tensors follow; as llama.cpp lays out."""
    out = [struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))]
    out += [string(key) + value(item) for key, item in metadata.items()]
    offset = end = 0
    for name, shape, type_id in tensors:
        size = size_bytes(type_id, shape)
        assert size is not None, f"{type_id} is none of {list(TYPES)}"
        out.append(entry(name, shape, type_id, offset))
        end = offset + size
        offset = end + -end % alignment
    written = b"".join(out)
    return written + bytes(-len(written) % alignment), end


def gguf(
    metadata: Mapping[str, Item] = SMALL, tensors: Sequence[Entry] = TENSORS, **options: int
) -> bytes:
    """A whole file, its tensors zeros."""
    written, data_bytes = header(metadata, tensors, **options)
    return written + bytes(data_bytes)


def write_sparse(
    path: Path, metadata: Mapping[str, Item] = SMALL, tensors: Sequence[Entry] = TENSORS
) -> Path:
    """A file whose tensors are a hole: as large as it should be, and no bytes on the disk."""
    written, data_bytes = header(metadata, tensors)
    with path.open("wb") as file:
        file.write(written)
        file.truncate(len(written) + data_bytes)
    return path


def split(count: int, number: int, tensor_count: int) -> dict[str, Item]:
    """The keys by which a part says what it is a part of."""
    return {
        "split.no": ("u16", number),
        "split.count": ("u16", count),
        "split.tensors.count": ("i32", tensor_count),
    }
