"""llama-server's slots: what it is asked to save and restore, and the files that it writes.

A file begins with b"qsgg", a version and a number of words, 32 bits each, little-endian. The words
are tokens; since builds with images they begin with -1, a version and the number of tokens, and
what follows the tokens tells where the images are. Then comes the state, which is the engine's own.
"""

import struct
from array import array
from collections.abc import Sequence
from urllib.parse import urlencode

import msgspec

LIST_PATH = "/slots"
COMPLETION_PATH = "/completion"

HEAD_BYTES = 12
WORDS_MAX = 2**21
_MAGIC = b"qsgg"
_PACKED = -1
_PACKED_VERSION = 1
_PACKED_WORDS = 4
"""Beside the tokens: the mark, the version, the number of tokens and that of images."""


class Held(msgspec.Struct, frozen=True):
    """One slot. `n_prompt_tokens`: what it holds; older builds, and an unused slot, do not say."""

    id: int
    is_processing: bool
    n_prompt_tokens: int = 0


class _Saved(msgspec.Struct, frozen=True):
    n_saved: int
    n_written: int


class _Restored(msgspec.Struct, frozen=True):
    n_restored: int


class _Timings(msgspec.Struct, frozen=True):
    cache_n: int = 0


class _Completed(msgspec.Struct, frozen=True):
    timings: _Timings


_HELD = msgspec.json.Decoder(tuple[Held, ...])
_SAVED = msgspec.json.Decoder(_Saved)
_RESTORED = msgspec.json.Decoder(_Restored)
_COMPLETED = msgspec.json.Decoder(_Completed)

# --- what is asked


def action_path(slot: int, action: str) -> str:
    """Where a slot is asked to "save" or to "restore"."""
    return f"{LIST_PATH}/{slot}?{urlencode({'action': action})}"


def action_body(file: str) -> bytes:
    """The file is named without its directory."""
    return msgspec.json.encode({"filename": file})


def trial_body(slot: int, tokens: Sequence[int]) -> bytes:
    """A prompt that goes on where the slot ends: nothing has to be taken back for it."""
    return msgspec.json.encode(
        {
            "prompt": [*tokens, tokens[-1]],
            "id_slot": slot,
            "cache_prompt": True,
            "n_predict": 1,
            "response_fields": ["timings"],
        }
    )


# --- what is answered. All raise ValueError for what is no such answer, an error of it included.


def parse_held(status: int, body: bytes) -> tuple[Held, ...]:
    """All slots."""
    return _HELD.decode(_good(status, body))


def parse_saved(status: int, body: bytes) -> tuple[int, int]:
    """How many tokens, and how many bytes."""
    saved = _SAVED.decode(_good(status, body))
    return saved.n_saved, saved.n_written


def parse_restored(status: int, body: bytes) -> int:
    """How many tokens."""
    return _RESTORED.decode(_good(status, body)).n_restored


def parse_cached(status: int, body: bytes) -> int:
    """How many tokens of a trial's prompt were there already."""
    return _COMPLETED.decode(_good(status, body)).timings.cache_n


def _good(status: int, body: bytes) -> bytes:
    if status != 200:
        said = body[:200].decode(errors="replace").strip()
        raise ValueError(f"HTTP status {status} {said}".strip())
    return body


# --- the file


def words_bytes(head: bytes, file_bytes: int) -> int:
    """How many bytes of words follow the first `HEAD_BYTES` of a file. Raises ValueError."""
    if len(head) < HEAD_BYTES or head[:4] != _MAGIC:
        raise ValueError("it is no saved slot")
    _version, words = struct.unpack_from("<II", head, 4)
    if words > WORDS_MAX or 4 * words > file_bytes - HEAD_BYTES:
        raise ValueError(f"it cannot have {words} tokens")
    return 4 * int(words)


def parse_tokens(data: bytes) -> tuple[int, ...]:
    """The tokens among the words of a file.

    Raises ValueError for what is not as it should be, and for images: no prompt of ours has any.
    """
    words = array("i")
    try:
        words.frombytes(data)
    except ValueError:
        raise ValueError("its words are cut off") from None
    tokens = _unpacked(words) if words and words[0] == _PACKED else words
    if not tokens or min(tokens) < 0:
        raise ValueError("it has no tokens, or some that are none")
    return tuple(tokens)


def _unpacked(words: "array[int]") -> "array[int]":
    if len(words) < _PACKED_WORDS or words[1] != _PACKED_VERSION:
        raise ValueError("its tokens are written in a way that is not known")
    end = 3 + words[2]
    if end != len(words) - 1 or words[end] != 0:
        raise ValueError("it has images, or says how many tokens it has and lies")
    return words[3:end]
