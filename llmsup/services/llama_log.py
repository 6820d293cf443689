"""What the log of a llama-server says of the memory it took (verbosity 4), or could not take.

Sizes are printed in MiB with two decimals, so bytes made of them are right to 5 KiB.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from llmsup.core.sizes import Sizes

MIB = 2**20
LINE_MAX_CHARS = 500

_HOST = re.compile(r"CPU(_\w+)?|\w*Host|BLAS")
_SIZE = r"(\S+)\s+{what} =\s+(\d{{1,9}}(?:\.\d{{1,6}})?) MiB"
_BUFFERS = (
    ("weights", "model buffer size"),
    ("weights", "LoRA buffer size"),
    ("kv_cache", "KV buffer size"),
    ("kv_cache", "RS buffer size"),
    ("compute", "compute buffer size"),
    ("compute", "output buffer size"),
)
_PATTERNS = tuple(
    (kind, words, re.compile(_SIZE.format(what=re.escape(words)))) for kind, words in _BUFFERS
)
_LAYERS = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_EFFECTIVE = re.compile(
    r"(n_ctx|n_ctx_seq|n_batch|n_ubatch|n_seq_max|kv_unified)\s+= (true|false|\d{1,9})$"
)
_NO_FLASH = "Flash Attention not supported"
_FAILED = re.compile(
    r"allocating (\d{1,9}(?:\.\d{1,6})?) MiB on device \d+: \w+ failed: out of memory"
)
_RAN_OUT = re.compile(r"(CUDA|HIP|MUSA) error: out of memory")


@dataclass(frozen=True)
class Loaded:
    """The buffers of one process on card and host.

    `gpu_layers` of `layers`; None where that was not said. `told` are the values that the engine
    settled on: n_ctx, n_ctx_seq, n_batch, n_ubatch, n_seq_max, kv_unified. `is_complete`: weights
    and a compute buffer were told, so nothing that counts is missing.
    """

    device: Sizes = field(default_factory=Sizes)
    host: Sizes = field(default_factory=Sizes)
    gpu_layers: int | None = None
    layers: int | None = None
    told: tuple[tuple[str, int], ...] = ()
    has_flash_attention: bool = True
    is_complete: bool = False


class Part(Enum):
    """What there was no memory for."""

    WEIGHTS = "weights"
    KV_CACHE = "KV cache"
    COMPUTE = "compute buffer"
    RUN_TIME = "work"


@dataclass(frozen=True)
class Shortfall:
    """One allocation on the card that failed. None: how many bytes it was to have was not said."""

    part: Part
    needed_bytes: int | None


_FOLLOWS = (
    ("failed to allocate buffer for kv cache", Part.KV_CACHE),
    ("failed to allocate compute ", Part.COMPUTE),
    ("unable to allocate ", Part.WEIGHTS),
)
"""How the engine goes on after an allocation that failed."""


def loaded(lines: Iterable[str]) -> Loaded:
    """What the lines of one process tell, oldest first. A later load replaces an earlier one."""
    sums: dict[tuple[bool, str], int] = {}
    told: dict[str, int] = {}
    layers: tuple[int | None, int | None] = (None, None)
    has_flash_attention, kinds = True, set()
    for line in _cut(lines):
        if " buffer size" in line:
            for kind, words, pattern in _PATTERNS:
                if words in line and (found := pattern.search(line)):
                    is_host = bool(_HOST.fullmatch(found[1]))
                    size_bytes = round(float(found[2]) * MIB)
                    sums[is_host, kind] = sums.get((is_host, kind), 0) + size_bytes
                    kinds.add(words)
        elif found := _LAYERS.search(line):
            # The engine may try a load in thought first, and prints all of this with zeros.
            layers = int(found[1]), int(found[2])
            sums, told, has_flash_attention, kinds = {}, {}, True, set()
        elif found := _EFFECTIVE.search(line):
            told[found[1]] = int(found[2] == "true") if found[2].isalpha() else int(found[2])
        elif _NO_FLASH in line:
            has_flash_attention = False
    return Loaded(
        device=_sizes(sums, is_host=False),
        host=_sizes(sums, is_host=True),
        gpu_layers=layers[0],
        layers=layers[1],
        told=tuple(sorted(told.items())),
        has_flash_attention=has_flash_attention,
        is_complete={"model buffer size", "compute buffer size"} <= kinds,
    )


def shortfall(lines: Iterable[str]) -> Shortfall | None:
    """The allocation on the card that a process died of; None where it tells of none."""
    needed_bytes, part = None, None
    for line in _cut(lines):
        if found := _FAILED.search(line):
            # What it gets with fewer pipelines, say, is tried again: the last one counts.
            needed_bytes, part = round(float(found[1]) * MIB), part or Part.RUN_TIME
        elif _RAN_OUT.search(line):
            part = part or Part.RUN_TIME
        else:
            part = next((part for words, part in _FOLLOWS if words in line), part)
    return None if part is None else Shortfall(part, needed_bytes)


def short_bytes(lines: Sequence[str], overhead_bytes: int, free_bytes: int) -> int | None:
    """How much more would have had to be free for the allocation that failed.

    It failed on top of the buffers that the log has and of `overhead_bytes`, with `free_bytes`
    when the load began. None where the process does not tell.
    """
    failed = shortfall(lines)
    if failed is None or failed.needed_bytes is None:
        return None
    had_bytes = loaded(lines).device.total_bytes
    return max(0, had_bytes + failed.needed_bytes + overhead_bytes - free_bytes)


def _cut(lines: Iterable[str]) -> Iterator[str]:
    return (line[:LINE_MAX_CHARS].rstrip() for line in lines)


def _sizes(sums: Mapping[tuple[bool, str], int], *, is_host: bool) -> Sizes:
    return Sizes(*(sums.get((is_host, kind), 0) for kind in ("weights", "kv_cache", "compute")))
