"""Parses the header of one GGUF file, of versions 2 and 3, from the beginning of its bytes.

Every length, count and dimension is held against the size of the file and the bounds below before
anything is made of it. The vocabulary is not read: see `_Reader._jump`.
"""

from collections.abc import Iterable
from struct import Struct, unpack_from
from struct import error as StructError  # noqa: N812 - it is an exception
from typing import NamedTuple, NoReturn

from llmsup.config.models import MAGIC
from llmsup.config.units import size
from llmsup.config.wording import quoted
from llmsup.core.ggml import size_bytes
from llmsup.core.gguf import Header, Scalar, Tensor, Unread, Value
from llmsup.errors import Flaw, ModelFileError

HEADER_MAX_BYTES = 64 * 1024 * 1024
"""The largest known, with vocabularies of 262 000 tokens, take about 10 MiB."""
PIECE_MAX_BYTES = 1024 * 1024 * 1024
"""llama.cpp's own limit for one string: a length above it is no length."""
KEYS_MAX = 1024
TENSORS_MAX = 65_536
NAME_MAX_BYTES = 65_535
"""What the format allows a key; llama.cpp stops at 64 bytes for the name of a tensor."""
DIMENSIONS_MAX = 4
ELEMENTS_MAX = 2**63 - 1
DATA_MAX_BYTES = 10**15
NESTING_MAX = 4
NESTED_MAX = 65_536
STRING_READ_MAX_BYTES = 65_536
STRINGS_READ_MAX = 64
NUMBERS_READ_MAX = 1024
"""Longer strings and arrays are skipped: vocabularies, scores, a chat template of that length."""
JUMP_MIN_STRINGS = 1024

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_U32, _U64 = Struct("<I"), Struct("<Q")
_TENSOR_MIN_BYTES = _U64.size + _U32.size + _U32.size + _U64.size
_KEY_MIN_BYTES = _U64.size + _U32.size + 1
_STRING, _ARRAY = 8, 9
_KINDS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_SCALARS = {kind: Struct(f"<{code}") for kind, (_, code) in _KINDS.items()}


def parse(data: bytes, file_bytes: int) -> Header | None:
    """The header of a file of `file_bytes` that begins with `data`; None where more is needed.

    Raises ModelFileError.
    """
    for may_jump in (True, False):
        reader = _Reader(data, file_bytes, may_jump=may_jump)
        try:
            header = _header(reader)
        except _ShortError:
            if not reader.has_jumped:
                return None
        except ModelFileError:
            if not reader.has_jumped:
                raise
        else:
            if not reader.has_jumped or _is_beyond_doubt(header):
                return header
    return None


class _ShortError(Exception):
    """The header goes on beyond the bytes at hand."""


class _Entry(NamedTuple):
    """One line of the table of tensors, as it stands in the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _header(reader: "_Reader") -> Header:
    version = _version(reader)
    tensor_count, key_count = reader.u64(), reader.u64()
    reader.require_room(tensor_count * _TENSOR_MIN_BYTES + key_count * _KEY_MIN_BYTES)
    _require(tensor_count <= TENSORS_MAX, f"it tells of {tensor_count} tensors")
    _require(key_count <= KEYS_MAX, f"it tells of {key_count} keys")
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


def _version(reader: "_Reader") -> int:
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
    _require(version in _VERSIONS, f"it is GGUF of version {version}")
    return version


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(Flaw.CORRUPT, "its alignment is not a power of two")
    return alignment


def _entry(reader: "_Reader", alignment: int) -> _Entry:
    name = reader.name()
    dimensions = reader.u32()
    _require(dimensions <= DIMENSIONS_MAX, f"tensor {quoted(name)} has {dimensions} dimensions")
    shape = tuple(reader.u64() for _ in range(dimensions))
    elements = 1
    for rows in shape:
        elements *= rows
    if max(elements, *shape, 0) > ELEMENTS_MAX:
        raise ModelFileError(Flaw.CORRUPT, f"tensor {quoted(name)} has the shape {list(shape)}")
    entry = _Entry(name, shape, reader.u32(), reader.u64())
    if entry.offset % alignment:
        words = f"tensor {quoted(name)} begins at {entry.offset}, no multiple of {alignment}"
        raise ModelFileError(Flaw.CORRUPT, words)
    return entry


def _sized(entries: Iterable[_Entry], room: int) -> list[Tensor]:
    """The tensors with their sizes, in the order of the file.

    An engine may have types that we do not know, or know otherwise (forks of llama.cpp use the
    same ids). A type whose tensors would overlap what follows them is such a one.
    """
    listed = list(entries)
    offsets = sorted(entry.offset for entry in listed)
    following = dict(zip(offsets, [*offsets[1:], max([room, *offsets[-1:]])], strict=True))
    by_type = {entry.name: size_bytes(entry.type_id, entry.shape) for entry in listed}
    last = offsets[-1] if offsets else 0
    strange = {
        entry.type_id
        for entry in listed
        if (known := by_type[entry.name]) is None
        or (entry.offset < last and known > following[entry.offset] - entry.offset)
    }
    tensors = []
    for entry in listed:
        known = by_type[entry.name]
        if known is None or entry.type_id in strange:
            known = following[entry.offset] - entry.offset
        tensors.append(Tensor(*entry, known))
    return tensors


def _require_data(tensors: tuple[Tensor, ...], room: int) -> None:
    """The one thing that goes wrong in practice: a download that was cut off."""
    end = max((tensor.offset + tensor.size_bytes for tensor in tensors), default=0)
    if end > DATA_MAX_BYTES:
        raise ModelFileError(Flaw.CORRUPT, f"its header tells of {size(end)} of tensors")
    if end > room:
        says, has = size(end), size(room)
        words = f"the header says {says} of tensors, the file has {has}"
        if says == has:
            words = f"the last {end - room} bytes of its tensors are missing"
        raise ModelFileError(Flaw.TRUNCATED, words)


def _is_beyond_doubt(header: Header) -> bool:
    """Whether the tensors follow one another without a gap: nothing misread looks like that."""
    expected = 0
    for tensor in header.tensors:
        if tensor.offset != expected:
            return False
        expected += tensor.size_bytes + -tensor.size_bytes % header.alignment
    return bool(header.tensors)


def _require(holds: bool, words: str) -> None:
    """What is beyond our bounds but may be within those of an engine."""
    if not holds:
        raise ModelFileError(Flaw.UNKNOWN, words)


class _Reader:
    """A place in the bytes of a file, which moves on with each thing that is read."""

    def __init__(self, data: bytes, file_bytes: int, *, may_jump: bool) -> None:
        self.data = data
        self.file_bytes = file_bytes
        self.at = 0
        self.has_jumped = False
        self._nested = 0
        self._may_jump = may_jump
        self._keys = [b"tokenizer.", b"general.", b"quantize."]

    def expect_keys_of(self, architecture: Value) -> None:
        """Keys may begin with this, too."""
        if isinstance(architecture, str) and architecture:
            self._keys.append(f"{architecture}.".encode())

    def skip(self, length: int) -> int:
        """Go on by `length` bytes; where they start."""
        start = self.at
        if start + length > len(self.data):
            self._lack(start + length)
        self.at = start + length
        return start

    def require_room(self, length: int) -> None:
        """See that the file goes on for `length` bytes."""
        if self.at + length > self.file_bytes:
            self._lack(self.at + length)

    def u32(self) -> int:
        return int(_U32.unpack_from(self.data, self.skip(_U32.size))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.data, self.skip(_U64.size))[0])

    def name(self) -> str:
        """A key, or the name of a tensor."""
        length = self.u64()
        self.require_room(length)
        _require(length <= NAME_MAX_BYTES, f"it has a name of {size(length)}")
        start = self.skip(length)
        # Names that differ stay different, whatever bytes they are of.
        return self.data[start : self.at].decode(errors="backslashreplace")

    def value(self) -> Value:
        kind = self.u32()
        if scalar := _SCALARS.get(kind):
            number: Scalar = scalar.unpack_from(self.data, self.skip(scalar.size))[0]
            return number
        if kind == _STRING:
            return self._string()
        _require(kind == _ARRAY, f"it has a value of kind {kind}")
        return self._array(NESTING_MAX)

    def _string(self) -> str | Unread:
        length = self.u64()
        start = self.skip(length)
        if length > STRING_READ_MAX_BYTES:
            return Unread("string", length)
        return self.data[start : self.at].decode(errors="replace")

    def _array(self, nesting: int) -> Value:
        kind, count = self.u32(), self.u64()
        if scalar := _SCALARS.get(kind):
            start = self.skip(count * scalar.size)
            if count <= NUMBERS_READ_MAX:
                return unpack_from(f"<{count}{_KINDS[kind][1]}", self.data, start)
            return Unread(_KINDS[kind][0], count)
        if kind == _STRING:
            self.require_room(count * _U64.size)
            if count <= STRINGS_READ_MAX:
                return self._strings(count)
            if count < JUMP_MIN_STRINGS or not self._jump(count):
                self._skip_strings(count)
            return Unread("string", count)
        _require(kind == _ARRAY, f"it has an array of kind {kind}")
        self.require_room(count * (_U32.size + _U64.size))
        self._nested += count
        _require(nesting > 1, f"it has arrays in arrays, more than {NESTING_MAX} deep")
        _require(self._nested <= NESTED_MAX, f"it has {self._nested} arrays in arrays")
        for _ in range(count):
            self._array(nesting - 1)
        return Unread("array", count)

    def _strings(self, count: int) -> Value:
        read = [self._string() for _ in range(count)]
        texts = tuple(text for text in read if isinstance(text, str))
        return texts if len(texts) == count else Unread("string", count)

    def _skip_strings(self, count: int) -> None:
        """From one length to the next; this is where the time of an exact walk goes."""
        data, at, u64 = self.data, self.at, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + u64(data, at)[0]
        except (StructError, IndexError, OverflowError):
            self._lack(at + 8)
        if at > len(data):
            self._lack(at)
        self.at = at

    def _jump(self, count: int) -> bool:
        """Over `count` strings to the next key, which is guessed; False where there is none.

        A key of less than 256 bytes is written as its length, seven zeros and its text. A token
        may look like that, too: then what follows does not parse, or the tensors do not follow
        one another, and `parse` starts again without jumps.
        """
        if not self._may_jump:
            return False
        start, end = self.at + count * _U64.size, len(self.data)
        for key in self._keys:
            found = self.data.find(bytes(7) + key, start, end)
            if found > 0:
                end = found
        if end == len(self.data):
            return False
        self.at = end - 1
        self.has_jumped = True
        return True

    def _lack(self, end: int) -> NoReturn:
        """The bytes up to `end` are not at hand."""
        if end > self.file_bytes + PIECE_MAX_BYTES:
            words = f"its header has a length that leads to byte {end} of {self.file_bytes}"
            raise ModelFileError(Flaw.CORRUPT, words)
        if end > self.file_bytes:
            words = f"the file ends within its header, after {size(self.file_bytes)}"
            raise ModelFileError(Flaw.TRUNCATED, words)
        _require(end <= HEADER_MAX_BYTES, f"its header is larger than {size(HEADER_MAX_BYTES)}")
        raise _ShortError
