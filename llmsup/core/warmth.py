"""Which saved slots a server may be given back, and when a slot is worth saving.

A slot holds the prompt cache of one conversation. Saved, it is good for another process of the same
service that is the same in all that a prompt cache depends on; `Saved.key` stands for all of that.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llmsup.core.estimate import off_card
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape

TOKENS_MIN = 64
"""Of fewer tokens a cache is made anew in a moment."""

FREE_MIN_BYTES = 2**30
"""So much of the disk stays free."""

SIZE_MAX_BYTES = 2 * 2**30
"""What is larger takes too long to write while somebody waits for another model."""

_SLACK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Saved:
    """One slot in a file, which has this `fingerprint` as long as nobody writes to it.

    Times are Unix seconds.
    """

    file: str
    service: str
    key: str
    slot: int
    tokens: int
    size_bytes: int
    time: float
    until_time: float
    fingerprint: tuple[int, ...]


def comes_back(shape: ModelShape, options: Options) -> bool:
    """Whether a server goes on where a restored slot ends.

    With layers that attend to a window it does not: what is saved of their cache ends a token
    before what it asks for, and it begins anew. It has no window with `--swa-full`.
    """
    return options.swa_full or not any(block.window for block in shape.blocks)


def size_bytes(shape: ModelShape, options: Options, tokens: int) -> int:
    """How large the file of so many tokens will be, at most."""
    room = options.ctx_size
    estimate = off_card(shape, options)
    cache_bytes = estimate.device.kv_cache_bytes + estimate.host.kv_cache_bytes
    state = options.parallel * sum(4 * sum(block.state) for block in shape.blocks)
    return cache_bytes * min(tokens, room) // room + state + 4 * tokens + _SLACK_BYTES


def fits(size: int, free_bytes: int) -> bool:
    """Whether a file of `size` bytes may be written to a disk."""
    return size <= SIZE_MAX_BYTES and size + FREE_MIN_BYTES <= free_bytes


def is_current(saved: Saved, now_time: float) -> bool:
    """Whether its time has not run out. A clock that was set back makes it so, too."""
    return saved.time <= now_time < saved.until_time


def usable(saves: Iterable[Saved], key: str, now_time: float) -> tuple[Saved, ...]:
    """Those for a process with this key, the longest first."""
    found = [each for each in saves if each.key == key and is_current(each, now_time)]
    return tuple(sorted(found, key=lambda each: (-each.tokens, each.slot)))


def kept(saves: Iterable[Saved], services: Collection[str], now_time: float) -> tuple[Saved, ...]:
    """Those of these services whose time has not run out."""
    return tuple(each for each in saves if each.service in services and is_current(each, now_time))


def is_shown(tokens: Sequence[int], cached: int) -> bool:
    """Whether a server that had `cached` tokens of a prompt has all of the slot.

    The last one may be computed anew, since it is what the next follows from.
    """
    return cached >= len(tokens) - 1
