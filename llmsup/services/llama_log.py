"""What llama-server's log tells of a load: its buffers, its effective options, its shortage.

The lines are those of the library's INFO level (`-lv 4`), with or without the prefix of time and
level, or as JSON lines. Sizes are told as MiB with two decimals, so each is true to 0.005 MiB, and
bytes made of it are no multiple of anything. A pass of `-fit on` tells of a model of 0.00 MiB and
of the contexts that it tried with it: those do not count.

Output is hostile until proven otherwise: so many lines of so many characters are looked at, only
where a word of ours is in them, and none after the model is loaded.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from llmsup.core.diagnosis import HOST_BUFFER
from llmsup.core.sizes import Sizes

MIB = 2**20
_LINES_MAX = 50_000
_LINE_MAX_CHARS = 500

_HOST = re.compile(rf"{HOST_BUFFER}\w*|AMX")
_SIZE = r"(\d{1,9}(?:\.\d{1,6})?) MiB"
_BUFFER = re.compile(
    rf"(?:^|[\s\"])(\w+): +(?:(\S+) +)?"
    rf"(model|output|KV|RS|DSV4 [\w ]{{1,40}}|compute|LoRA) buffer size += +{_SIZE}"
)
_OPTION = re.compile(
    r"\b(n_seq_max|n_ctx|n_ctx_seq|n_ctx_per_seq|n_batch|n_ubatch|kv_unified) += (\w{1,12})\b"
)
_OFFLOADED = re.compile(r"offloaded (\d{1,5})/(\d{1,5}) layers to GPU")
_FLASH = re.compile(
    r"Flash Attention (?:was auto, set to )?(enabled|disabled|not supported, set to disabled)"
    r"|\bflash_attn += (enabled|disabled|[01])\b"
)
_BUILD = re.compile(r"\bbuild:? (\d{1,9} \([0-9a-z]{1,40}\))")
_PROJECTOR_ON = re.compile(r"CLIP using (\S+) backend")
_PROJECTOR = re.compile(rf"\bmodel size: +{_SIZE}")
_CONTEXT_BEGINS = "constructing llama_context"
_IS_LOADED = ": model loaded"
_PROJECTOR_COMPUTE = "reserve_compute_meta"


@dataclass(frozen=True, slots=True)
class Effective:
    """The options as the engine made them out; None where the log does not tell. Tokens."""

    n_ctx: int | None = None
    n_ctx_seq: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_seq_max: int | None = None
    kv_unified: bool | None = None
    flash_attn: bool | None = None


class Part(Enum):
    """What of a server could not be allocated, in the order in which a load allocates it."""

    WEIGHTS = "weights"
    KV_CACHE = "KV cache"
    COMPUTE = "compute buffer"
    RUNTIME = "run time"  # it was loaded, and needed more than it had reserved
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One failed allocation. `needed_bytes`: its size; None where the log does not tell."""

    part: Part
    needed_bytes: int | None = None


_NOTHING = Sizes()
_NOT_TOLD = Effective()


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load. `devices`: the names of those that hold something of it, such as "CUDA0".

    `device` and `host` are of the models and their contexts, a draft model's among them;
    `extra_bytes`: what adapters and a projector take on the devices. `layers`: how many there are,
    the output layer among them; with `--device none` the engine calls them offloaded, too. `build`:
    "11434 (c0ffee)", empty where it is not told.
    """

    device: Sizes = _NOTHING
    host: Sizes = _NOTHING
    extra_bytes: int = 0
    devices: frozenset[str] = frozenset()
    effective: Effective = _NOT_TOLD
    offloaded_layers: int | None = None
    layers: int | None = None
    build: str = ""
    is_complete: bool = False


@dataclass
class _Load:
    """One model with its contexts, while it is read. Bytes by the name of the buffer."""

    weights: dict[str, int] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    computes: list[dict[str, int]] = field(default_factory=lambda: [{}])
    options: dict[str, str] = field(default_factory=dict)
    flash_attn: bool | None = None
    has_context: bool = False

    @property
    def is_real(self) -> bool:
        return any(self.weights.values())

    @property
    def is_complete(self) -> bool:
        return self.is_real and any(any(each.values()) for each in self.computes)


@dataclass
class _Reading:
    """What was read so far."""

    loads: list[_Load] = field(default_factory=lambda: [_Load()])
    extra: dict[str, int] = field(default_factory=dict)
    projector_compute: dict[str, int] = field(default_factory=dict)
    projector_bytes: int = 0
    projector_on: str = "CPU"
    offloaded: tuple[int, int] | None = None
    build: str = ""


def parse(lines: Iterable[str]) -> Loaded:
    """What the lines of one process tell of its load, from the first on. Never raises."""
    reading = _Reading()
    for long_line in islice(lines, _LINES_MAX):
        line = long_line[:_LINE_MAX_CHARS]
        if _IS_LOADED in line and reading.loads[-1].is_complete:
            break
        _read(line, reading)
    return _loaded(reading)


def shortfall(lines: Iterable[str]) -> Shortfall:
    """What an engine that ran out of GPU memory (`Cause.GPU_MEMORY`) said it could not have."""
    part, needed = Part.UNKNOWN, None
    for long_line in islice(lines, _LINES_MAX):
        line = long_line[:_LINE_MAX_CHARS]
        if "alloc" not in line.lower() and "out of memory" not in line:
            continue
        needed = _needed_bytes(line) or needed
        part = next((each for each, words in _SHORT_OF if words.search(line)), part)
    return Shortfall(part, needed)


def short_bytes(lines: Sequence[str], overhead_bytes: int, free_bytes: int) -> int | None:
    """How much more would have had to be free for the allocation that failed.

    It failed on top of the buffers that the log has and of `overhead_bytes`, with `free_bytes`
    when the load began. None where the process does not tell.
    """
    needed_bytes = shortfall(lines).needed_bytes
    if needed_bytes is None:
        return None
    had = parse(lines)
    had_bytes = had.device.total_bytes + had.extra_bytes
    return max(0, had_bytes + needed_bytes + overhead_bytes - free_bytes)


# --- a shortage

_SHORT_OF = (
    (Part.RUNTIME, re.compile(r"(CUDA|ROCm|HIP|MUSA) error: out of memory")),
    (Part.WEIGHTS, re.compile(rf"unable to allocate (?!{HOST_BUFFER})\S+ buffer|lora adapter")),
    (Part.KV_CACHE, re.compile(r"failed to allocate buffer for (kv cache|rs cache|DSV4)")),
    (Part.COMPUTE, re.compile(r"failed to allocate compute (pp |tg )?buffers")),
)
_NEEDED_MIB = re.compile(rf"allocating {_SIZE} on device \d+: \w+ failed: out of memory")
_NEEDED_BYTES = re.compile(
    rf"failed to allocate (?!{HOST_BUFFER}|output)\S+ buffer of size (\d{{1,15}})\b"
    r"|Device memory allocation of size (\d{1,15}) failed"
)


def _needed_bytes(line: str) -> int | None:
    if exact := _NEEDED_BYTES.search(line):
        return int(exact[1] or exact[2])
    rounded = _NEEDED_MIB.search(line)
    return None if rounded is None else _bytes(rounded[1])


# --- a load


def _read(line: str, reading: _Reading) -> None:
    """Add what one line tells."""
    load = reading.loads[-1]
    if " buffer size " in line:
        if found := _BUFFER.search(line):
            function, name, kind, mib = found.groups()
            _add_buffer(reading, function, name or "CPU", kind, _bytes(mib))
    elif _CONTEXT_BEGINS in line:
        if load.has_context and any(load.computes[-1].values()):
            load.computes.append({})
        load.has_context = True
    elif " = " in line and (option := _OPTION.search(line)):
        load.options.setdefault(option[1], option[2])
    elif " layers to GPU" in line and (layers := _OFFLOADED.search(line)):
        reading.offloaded = int(layers[1]), int(layers[2])
    elif "build" in line and not reading.build and (build := _BUILD.search(line)):
        reading.build = build[1]
    elif "CLIP using " in line and (backend := _PROJECTOR_ON.search(line)):
        reading.projector_on = backend[1]
    elif "model size:" in line and (size := _PROJECTOR.search(line)):
        reading.projector_bytes = _bytes(size[1])
    if ("lash" in line) and (flash := _FLASH.search(line)):
        load.flash_attn = (flash[1] or flash[2]) in {"enabled", "1"}


def _add_buffer(reading: _Reading, function: str, name: str, kind: str, size: int) -> None:
    load = reading.loads[-1]
    if kind == "model":
        if load.has_context:
            load = _Load()
            reading.loads.append(load)
        _add(load.weights, name, size)
    elif kind == "LoRA":
        _add(reading.extra, name, size)
    elif function == _PROJECTOR_COMPUTE:
        reading.projector_compute[name] = size
    else:
        load.has_context = True
        if kind == "compute":
            load.computes[-1][name] = size  # reserved once more, it is another buffer
        else:
            _add(load.outputs if kind == "output" else load.cache, name, size)


def _loaded(reading: _Reading) -> Loaded:
    real = [load for load in reading.loads if load.is_real]
    if not real:
        return Loaded(build=reading.build)
    weights, cache, compute = _Sides(), _Sides(), _Sides()
    for load in real:
        weights.add(load.weights)
        cache.add(load.cache)
        for each in (*load.computes, load.outputs):
            compute.add(each)
    extra = _Sides()
    extra.add(reading.extra)
    extra.add(reading.projector_compute)
    extra.add({reading.projector_on: reading.projector_bytes})
    offloaded, layers = reading.offloaded or (None, None)
    return Loaded(
        Sizes(weights.device, cache.device, compute.device),
        Sizes(weights.host, cache.host, compute.host),
        extra.device,
        frozenset(weights.devices | cache.devices | compute.devices | extra.devices),
        _effective(real[0]),
        offloaded,
        layers,
        reading.build,
        real[0].is_complete,
    )


def _effective(load: _Load) -> Effective:
    def number(*names: str) -> int | None:
        told = next((load.options[name] for name in names if name in load.options), "")
        return int(told) if told.isascii() and told.isdigit() else None

    unified = {"true": True, "1": True, "false": False, "0": False}
    return Effective(
        number("n_ctx"),
        number("n_ctx_seq", "n_ctx_per_seq"),
        number("n_batch"),
        number("n_ubatch"),
        number("n_seq_max"),
        unified.get(load.options.get("kv_unified", "")),
        load.flash_attn,
    )


@dataclass
class _Sides:
    """Bytes of one kind on the devices and on the host."""

    device: int = 0
    host: int = 0
    devices: set[str] = field(default_factory=set)

    def add(self, buffers: dict[str, int]) -> None:
        for name, size in buffers.items():
            if _HOST.fullmatch(name):
                self.host += size
            elif size:
                self.device += size
                self.devices.add(name)


def _add(buffers: dict[str, int], name: str, size: int) -> None:
    buffers[name] = buffers.get(name, 0) + size


def _bytes(mib: str) -> int:
    return round(float(mib) * MIB)
