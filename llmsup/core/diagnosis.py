"""How a process ended and what it said last, to a cause. The cause decides whether to try again.

Rules are tried in order; the first whose pattern stands in one of the last lines wins. The words
are those of llama-server, ggml, CUDA and the dynamic loader.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """Why a process died. The value is for people and for metrics."""

    GPU_MEMORY = "out of GPU memory"
    HOST_MEMORY = "out of memory"
    MODEL_MISSING = "model file missing"
    MODEL_CORRUPT = "model file corrupt"
    MODEL_UNKNOWN = "model not known to this engine"
    BAD_FLAG = "bad flag"
    PORT_IN_USE = "port in use"
    LIBRARY_MISSING = "shared library missing"
    ILLEGAL_INSTRUCTION = "illegal instruction"
    KILLED = "killed by somebody"
    CRASHED = "crashed"
    EXITED = "exited"


PERMANENT = frozenset(
    {
        Cause.MODEL_MISSING,
        Cause.MODEL_CORRUPT,
        Cause.MODEL_UNKNOWN,
        Cause.BAD_FLAG,
        Cause.LIBRARY_MISSING,
        Cause.ILLEGAL_INSTRUCTION,
    }
)
"""Causes that a new process of the same launch would die of again."""


@dataclass(frozen=True)
class Ending:
    """What is known of an end.

    `words`: the exit in words, "killed by SIGKILL". `code` or `signal` as the kernel told them,
    None where it did not. `lines`: the last output, oldest first. `oom_kills`: how many processes
    of our control group the kernel killed for memory while this one lived.
    """

    words: str
    code: int | None = None
    signal: int | None = None
    lines: Sequence[str] = ()
    oom_kills: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """The cause, and the sentence that says so."""

    cause: Cause
    reason: str

    @property
    def is_permanent(self) -> bool:
        """Whether trying again without a change is useless."""
        return self.cause in PERMANENT


SIGILL, SIGKILL, SIGTERM, SIGINT, SIGHUP = 4, 9, 15, 2, 1
KILLING = frozenset({SIGKILL, SIGTERM, SIGINT, SIGHUP})
"""Signals that come from outside: from a person, a program or the kernel's OOM killer."""

_RULES: tuple[tuple[Cause, re.Pattern[str]], ...] = tuple(
    (cause, re.compile(pattern, re.IGNORECASE))
    for cause, pattern in (
        (Cause.GPU_MEMORY, r"cudaMalloc failed: out of memory"),
        (Cause.GPU_MEMORY, r"CUDA error: out of memory"),
        (Cause.GPU_MEMORY, r"(hip|musa)Malloc failed: out of memory|ErrorOutOfDeviceMemory"),
        (Cause.GPU_MEMORY, r"unable to allocate (?!CPU)\w+ buffer"),
        (Cause.HOST_MEMORY, r"std::bad_alloc|unable to allocate CPU\w* buffer"),
        (Cause.HOST_MEMORY, r"mmap failed: Cannot allocate memory"),
        (Cause.LIBRARY_MISSING, r"error while loading shared libraries: \S+"),
        (Cause.MODEL_UNKNOWN, r"unknown model architecture: '[^']*'"),
        (
            Cause.MODEL_MISSING,
            r"failed to open GGUF file|gguf_init_from_file: .{0,300}No such file",
        ),
        (Cause.MODEL_CORRUPT, r"not within the file bounds, model is corrupted or incomplete"),
        (Cause.MODEL_CORRUPT, r"invalid magic characters|failed to read magic"),
        (Cause.MODEL_CORRUPT, r"gguf_init_from_(file|reader)\w*: (failed|invalid|bad)"),
        (Cause.PORT_IN_USE, r"couldn't bind HTTP server socket.*|Address already in use"),
        (Cause.BAD_FLAG, r"error: (invalid|unknown) argument: .+"),
        (Cause.BAD_FLAG, r"error while handling argument .+"),
    )
)
_STAMP = re.compile(r"^[\d.]+ [A-Z] \s*")
_LAST_LINES = 60
_LINE_MAX_CHARS = 500
_WORDS_MAX_CHARS = 200


def diagnose(ending: Ending) -> Diagnosis:
    """The most telling cause of an end. Total: every ending has one."""
    if ending.code == 0:
        return Diagnosis(Cause.EXITED, ending.words)
    recent = [line[:_LINE_MAX_CHARS] for line in ending.lines[-_LAST_LINES:]]
    for cause, pattern in _RULES:
        for line in recent:
            if pattern.search(line):
                return Diagnosis(cause, _sentence(ending, cause, _said(line)))
    cause = _cause_of_exit(ending)
    if cause is Cause.HOST_MEMORY:
        return Diagnosis(cause, f"{ending.words}: the kernel was out of memory")
    if cause is Cause.ILLEGAL_INSTRUCTION:
        return Diagnosis(cause, f"{ending.words}: it was built for another processor")
    last = next((_said(line) for line in reversed(recent) if line.strip()), "")
    # Who was killed did not say why: its last line was about something else.
    if cause is Cause.KILLED or not last:
        return Diagnosis(cause, ending.words)
    return Diagnosis(cause, f"{ending.words}: {last}")


def _cause_of_exit(ending: Ending) -> Cause:
    if ending.signal == SIGKILL and ending.oom_kills:
        return Cause.HOST_MEMORY
    if ending.signal == SIGILL:
        return Cause.ILLEGAL_INSTRUCTION
    if ending.signal in KILLING:
        return Cause.KILLED
    return Cause.EXITED if ending.signal is None else Cause.CRASHED


def _sentence(ending: Ending, cause: Cause, said: str) -> str:
    """The cause, unless its own words say it already, and those words."""
    label = "" if cause.value in said.lower() else f"{cause.value}: "
    return f"{ending.words}: {label}{said}"


def _said(line: str) -> str:
    """A log line without llama-server's time stamp, level and padding, cut to a sentence."""
    words = re.sub(r"\s+", " ", _STAMP.sub("", line)).strip()
    return words if len(words) <= _WORDS_MAX_CHARS else words[: _WORDS_MAX_CHARS - 1] + "…"
