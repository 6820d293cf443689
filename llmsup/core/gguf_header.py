"""Parses the header of one GGUF file, of versions 2 and 3, from the beginning of its bytes.

Every length, count and dimension is held against the size of the file and the bounds below before
anything is made of it. The vocabulary is not read: see `Reader._jump`.
"""

from collections.abc import Iterable
from itertools import pairwise
from math import prod
from struct import Struct
from typing import NamedTuple

from llmsup.config.models import MAGIC
from llmsup.config.units import shown_size
from llmsup.config.wording import quoted
from llmsup.core.ggml import size_bytes
from llmsup.core.gguf import Header, Tensor, Value
from llmsup.core.gguf_reader import Reader, ShortError, require
from llmsup.errors import Flaw, ModelFileError

KEYS_MAX = 1024
TENSORS_MAX = 65_536
DIMENSIONS_MAX = 4
ELEMENTS_MAX = 2**63 - 1
DATA_MAX_BYTES = 10**15

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_TENSOR_MIN_BYTES = 8 + 4 + 4 + 8
_KEY_MIN_BYTES = 8 + 4 + 1


def parse(data: bytes, file_bytes: int) -> Header | None:
    """The header of a file of `file_bytes` that begins with `data`; None where more is needed.

    Raises ModelFileError.
    """
    for may_jump in (True, False):
        reader = Reader(data, file_bytes, may_jump=may_jump)
        try:
            header = _header(reader)
        except ShortError:
            if not reader.has_jumped:
                return None
        except ModelFileError:
            if not reader.has_jumped:
                raise
        else:
            if not reader.has_jumped or _is_beyond_doubt(header):
                return header
    return None


_REST_OF_ENTRY = [Struct(f"<{dimensions}QIQ") for dimensions in range(DIMENSIONS_MAX + 1)]
"""The shape, the type and the offset of a tensor, by how many dimensions it has."""


class _Entry(NamedTuple):
    """One line of the table of tensors, as it stands in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _header(reader: Reader) -> Header:
    version = _version(reader)
    tensor_count, key_count = reader.u64(), reader.u64()
    reader.require_room(tensor_count * _TENSOR_MIN_BYTES + key_count * _KEY_MIN_BYTES)
    require(tensor_count <= TENSORS_MAX, f"it tells of {tensor_count} tensors")
    require(key_count <= KEYS_MAX, f"it tells of {key_count} keys")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = reader.name()
        if key in metadata:
            raise ModelFileError(Flaw.CORRUPT, f"key {quoted(key)} is there twice")
        metadata[key] = reader.value()
        if key == "general.architecture":
            reader.expect_keys_of(metadata[key])
    alignment = _alignment(metadata)
    entries: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        entry = _entry(reader, alignment)
        if entry.name in entries:
            raise ModelFileError(Flaw.CORRUPT, f"tensor {quoted(entry.name)} is there twice")
        entries[entry.name] = entry
    data_offset = reader.at + -reader.at % alignment
    room = max(0, reader.file_bytes - data_offset)
    tensors = tuple(_sized(entries.values(), room))
    _require_data(tensors, room)
    return Header(version, metadata, tensors, alignment, data_offset, reader.file_bytes)


def _version(reader: Reader) -> int:
    if reader.file_bytes == 0:
        raise ModelFileError(Flaw.TRUNCATED, "it is empty")
    start = reader.data[: len(MAGIC)]
    if not MAGIC.startswith(start):
        raise ModelFileError(Flaw.FORMAT, f"it starts with {start!r}, not with {MAGIC!r}")
    reader.skip(len(MAGIC))
    version = reader.u32()
    if version & 0xFFFF == 0 and version:
        raise ModelFileError(Flaw.FORMAT, "it is for big-endian machines")
    if version < min(_VERSIONS):
        words = f"it is GGUF of version {version}, which no engine loads any more"
        raise ModelFileError(Flaw.FORMAT, words)
    require(version in _VERSIONS, f"it is GGUF of version {version}")
    return version


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(Flaw.CORRUPT, "its alignment is not a power of two")
    return alignment


def _entry(reader: Reader, alignment: int) -> _Entry:
    name = reader.name()
    dimensions = reader.u32()
    if dimensions > DIMENSIONS_MAX:
        words = f"tensor {quoted(name)} has {dimensions} dimensions"
        raise ModelFileError(Flaw.UNKNOWN, words)
    *shape, type_id, offset = reader.numbers(_REST_OF_ENTRY[dimensions])
    if max(prod(shape), *shape, 0) > ELEMENTS_MAX:
        raise ModelFileError(Flaw.CORRUPT, f"tensor {quoted(name)} has the shape {shape}")
    if offset % alignment:
        words = f"tensor {quoted(name)} begins at {offset}, no multiple of {alignment}"
        raise ModelFileError(Flaw.CORRUPT, words)
    return _Entry(name, tuple(shape), type_id, offset)


def _sized(entries: Iterable[_Entry], room: int) -> list[Tensor]:
    """The tensors with their sizes, in the order of the file.

    An engine may have types that we do not know, or know otherwise (forks of llama.cpp use the
    same ids). A type whose tensors would overlap what follows them is such a one.
    """
    listed = list(entries)
    offsets = sorted({entry.offset for entry in listed})
    rooms = {offset: end - offset for offset, end in pairwise([*offsets, room])}
    by_type = {entry.name: size_bytes(entry.type_id, entry.shape) for entry in listed}
    strange = {
        entry.type_id
        for entry in listed
        if (known := by_type[entry.name]) is None
        or (entry.offset != offsets[-1] and known > rooms[entry.offset])
    }
    tensors = []
    for entry in listed:
        known = by_type[entry.name]
        if known is None or entry.type_id in strange:
            known = max(0, rooms[entry.offset])
        tensors.append(Tensor(*entry, known))
    return tensors


def _require_data(tensors: tuple[Tensor, ...], room: int) -> None:
    """The one thing that goes wrong in practice: a download that was cut off."""
    end = max((tensor.offset + tensor.size_bytes for tensor in tensors), default=0)
    if end > DATA_MAX_BYTES:
        raise ModelFileError(Flaw.CORRUPT, f"its header tells of {shown_size(end)} of tensors")
    if end > room:
        says, has = shown_size(end), shown_size(room)
        words = f"the header says {says} of tensors, the file has {has}"
        if says == has:
            words = f"the last {end - room} bytes of its tensors are missing"
        raise ModelFileError(Flaw.TRUNCATED, words)


def _is_beyond_doubt(header: Header) -> bool:
    """Whether the tensors follow one another without a gap: nothing misread looks like that.

    A token and the zeros after it may look like one tensor without dimensions.
    """
    expected = 0
    for tensor in header.tensors:
        if tensor.offset != expected or not tensor.shape:
            return False
        expected += tensor.size_bytes + -tensor.size_bytes % header.alignment
    return bool(header.tensors)
