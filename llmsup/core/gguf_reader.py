"""The values in a GGUF header, read one after another within bounds.

No length or count is believed before it is held against the size of the file and the bounds below.
"""

from struct import Struct, unpack_from
from struct import error as StructError  # noqa: N812 - it is an exception
from typing import NoReturn

from llmsup.config.units import shown_size
from llmsup.core.gguf import Scalar, Unread, Value
from llmsup.errors import Flaw, ModelFileError

HEADER_MAX_BYTES = 64 * 1024 * 1024
"""The largest known, with vocabularies of 262 000 tokens, take about 10 MiB."""
PIECE_MAX_BYTES = 1024 * 1024 * 1024
"""llama.cpp's own limit for one string: a length above it is no length."""
NAME_MAX_BYTES = 65_535
"""What the format allows a key; llama.cpp stops at 64 bytes for the name of a tensor."""
NESTING_MAX = 4
NESTED_MAX = 65_536
STRING_READ_MAX_BYTES = 65_536
STRINGS_READ_MAX = 64
NUMBERS_READ_MAX = 1024
"""Longer strings and arrays are skipped: vocabularies, scores, a chat template of that length."""
JUMP_MIN_STRINGS = 1024

_U32, _U64 = Struct("<I"), Struct("<Q")
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


class ShortError(Exception):
    """The header goes on beyond the bytes at hand."""


def require(holds: bool, words: str) -> None:
    """Raises ModelFileError for what is beyond our bounds but may be within an engine's."""
    if not holds:
        raise ModelFileError(Flaw.UNKNOWN, words)


class Reader:
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
        """A whole number of 4 bytes."""
        return int(_U32.unpack_from(self.data, self.skip(_U32.size))[0])

    def u64(self) -> int:
        """A whole number of 8 bytes."""
        return int(_U64.unpack_from(self.data, self.skip(_U64.size))[0])

    def numbers(self, layout: Struct) -> tuple[int, ...]:
        """Whole numbers side by side."""
        return layout.unpack_from(self.data, self.skip(layout.size))

    def name(self) -> str:
        """A key, or the name of a tensor."""
        length = self.u64()
        self.require_room(length)
        if length > NAME_MAX_BYTES:
            raise ModelFileError(Flaw.UNKNOWN, f"it has a name of {shown_size(length)}")
        start = self.skip(length)
        # Not "replace": names of different bytes would become one.
        return self.data[start : self.at].decode(errors="backslashreplace")

    def value(self) -> Value:
        """A value, its kind in front."""
        kind = self.u32()
        if scalar := _SCALARS.get(kind):
            number: Scalar = scalar.unpack_from(self.data, self.skip(scalar.size))[0]
            return number
        if kind == _STRING:
            return self._string()
        require(kind == _ARRAY, f"it has a value of kind {kind}")
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
        require(kind == _ARRAY, f"it has an array of kind {kind}")
        self.require_room(count * (_U32.size + _U64.size))
        self._nested += count
        require(nesting > 1, f"it has arrays in arrays, more than {NESTING_MAX} deep")
        require(self._nested <= NESTED_MAX, f"it has {self._nested} arrays in arrays")
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
            words = f"the file ends within its header, after {shown_size(self.file_bytes)}"
            raise ModelFileError(Flaw.TRUNCATED, words)
        require(
            end <= HEADER_MAX_BYTES, f"its header is larger than {shown_size(HEADER_MAX_BYTES)}"
        )
        raise ShortError
