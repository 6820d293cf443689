"""GGUF headers, which come from the network."""

import struct

import pytest
from hypothesis import strategies as st

from llmsup.core import gguf_reader
from llmsup.core.gguf import Header, joined
from llmsup.core.gguf_header import parse
from llmsup.errors import ModelFileError
from tests.fuzz.harness import fuzz, mutated
from tests.gguf_files import SMALL, TENSORS, gguf, header, split, string

TOKENS = (
    *(struct.pack("<Q", number) for number in (0, 1, 9, 255, 2**16, 2**31, 2**63, 2**64 - 1)),
    *(struct.pack("<I", kind) for kind in range(15)),
    *(struct.pack("<IIQ", 9, kind, count) for kind in (0, 8, 9) for count in (0, 3, 2**62)),
    string("general.alignment") + struct.pack("<II", 4, 3), string("tokenizer.ggml.tokens"),
    bytes(7) + b"general.", struct.pack("<IQ", 9, 1) * 20, b"\xff" * 8,
)  # fmt: skip
SEEDS = [
    gguf(),
    gguf(version=2),
    gguf({**SMALL, **split(3, 0, 4)}),
    gguf({}, TENSORS),
    gguf({"a": ("u8[][]", [[1], [2, 3]]), "general.alignment": ("u32", 64)}, (), alignment=64),
    header()[0],
]


def tried(data: bytes, file_bytes: int, least_jump: int) -> Header | ModelFileError | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_reader, "STRINGS_READ_MAX", 2)
        patch.setattr(gguf_reader, "JUMP_MIN_STRINGS", least_jump)
        try:
            return parse(data, file_bytes)
        except ModelFileError as error:
            return error


@fuzz(
    "GGUF header",
    data=st.one_of(mutated(SEEDS, TOKENS), st.binary(max_size=100).map(b"GGUF\3\0\0\0".__add__)),
    beyond=st.sampled_from([0, 0, 1, 100_000, 2**40]),
)
def test_any_header_is_read_or_refused(data: bytes, beyond: int) -> None:
    """A jump over the vocabulary refuses nothing that a walk through it would take."""
    file_bytes = len(data) + beyond
    jumped, walked = tried(data, file_bytes, 3), tried(data, file_bytes, 2**62)

    assert isinstance(jumped, Header) or not isinstance(walked, Header)
    for found in (jumped, walked):
        if isinstance(found, ModelFileError):
            assert len(found.message.splitlines()) == 1
            assert len(found.message) < 1000
        if isinstance(found, Header):
            assert len(found.metadata) <= len(data)
            assert all(tensor.size_bytes >= 0 for tensor in found.tensors)
            ends = [tensor.offset + tensor.size_bytes for tensor in found.tensors]
            assert found.data_offset + max(ends, default=0) <= file_bytes or not ends
            with_model(found)


def with_model(found: Header) -> None:
    try:
        model = joined([found])
    except ModelFileError:
        return
    assert model.vocabulary_size is None or model.vocabulary_size >= 0
    assert isinstance(model.architecture, str)
