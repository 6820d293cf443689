"""How a process ended and what it said last, to a cause. The cause decides whether to try again.

Rules are tried in order; the first whose pattern stands in one of the last lines wins. The words
are those of llama-server, ggml, CUDA and the dynamic loader.

Output is hostile until proven otherwise: so many lines of so many characters are looked at, and a
pattern only where its `needle` is in them at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from llmsup.errors import Flaw


class Cause(Enum):
    """Why a process died. The value is for people and for metrics."""

    GPU_MEMORY = "out of GPU memory"
    NO_ROOM = "no room on the card"
    GPU_FAILED = "GPU failed"
    HOST_MEMORY = "out of memory"
    MODEL_MISSING = "model file missing"
    MODEL_UNREADABLE = "model file not readable"
    MODEL_CORRUPT = "model file corrupt"
    MODEL_UNKNOWN = "model not known to this engine"
    BAD_FLAG = "bad flag"
    PORT_IN_USE = "port in use"
    CANNOT_LISTEN = "cannot listen"
    LIBRARY_MISSING = "shared library missing"
    LIBRARY_BROKEN = "shared library does not fit"
    ILLEGAL_INSTRUCTION = "illegal instruction"
    LAUNCH = "could not be started"
    PROMPT_CACHE = "its saved prompt cache"
    STALLED = "not ready in time"
    HUNG = "hung"
    KILLED = "killed by somebody"
    CRASHED = "crashed"
    EXITED = "exited"
    UNKNOWN = "unknown"


MODEL_CAUSES = {
    Flaw.MISSING: Cause.MODEL_MISSING,
    Flaw.UNREADABLE: Cause.MODEL_UNREADABLE,
    Flaw.FORMAT: Cause.MODEL_CORRUPT,
    Flaw.TRUNCATED: Cause.MODEL_CORRUPT,
    Flaw.CORRUPT: Cause.MODEL_CORRUPT,
    Flaw.UNKNOWN: Cause.MODEL_UNKNOWN,
}
"""What the server would have died of, had its model file not been looked at before."""

PERMANENT = frozenset(
    {
        Cause.MODEL_MISSING,
        Cause.MODEL_UNREADABLE,
        Cause.MODEL_CORRUPT,
        Cause.MODEL_UNKNOWN,
        Cause.BAD_FLAG,
        Cause.LIBRARY_MISSING,
        Cause.LIBRARY_BROKEN,
        Cause.ILLEGAL_INSTRUCTION,
    }
)
"""Causes that a new process of the same launch would die of again."""


@dataclass(frozen=True)
class OomKills:
    """Processes that the kernel killed for memory shortly before an end.

    `group`: those of the control group that the process was in, which may use `limit_bytes` (None:
    all there is); `machine`: all there were.
    """

    group: int = 0
    machine: int = 0
    limit_bytes: int | None = None


@dataclass(frozen=True)
class Ending:
    """What is known of an end.

    `words`: the exit in words, "killed by SIGKILL". `code` or `signal` as the kernel told them,
    None where it did not. `lines`: the last output, oldest first. `was_ready`: it had been ready,
    so it did not die of what fails a start.
    """

    words: str
    code: int | None = None
    signal: int | None = None
    lines: Sequence[str] = ()
    oom_kills: OomKills = OomKills()
    was_ready: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """The cause, and the sentence that says so. `ports`: what it may not have been able to bind."""

    cause: Cause
    reason: str
    ports: tuple[int, ...] = ()

    @property
    def is_permanent(self) -> bool:
        """Whether trying again without a change is useless."""
        return self.cause in PERMANENT


SIGILL, SIGABRT, SIGKILL, SIGTERM, SIGINT, SIGHUP = 4, 6, 9, 15, 2, 1
KILLING = frozenset({SIGKILL, SIGTERM, SIGINT, SIGHUP})
"""Signals that come from outside: from a person, a program or the kernel's OOM killer."""

LOADER_FAILED = 127
"""The exit status of the dynamic loader, and of a shell that did not find its command."""

_SIGNALLED = 128
"""A shell whose command was killed by signal n exits with 128 + n."""


@dataclass(frozen=True)
class _Rule:
    """`pattern` is looked for where `needle` (in lower case) is there at all.

    `code`: only of a process that exited with it.
    """

    cause: Cause
    needle: str
    pattern: re.Pattern[str]
    code: int | None = None


def _rule(cause: Cause, needle: str, pattern: str = "", code: int | None = None) -> _Rule:
    return _Rule(cause, needle, re.compile(pattern or re.escape(needle), re.IGNORECASE), code)


HOST_BUFFER = r"(?:CPU|\w+_Host)"
"""How the name of a buffer begins that is no memory of the card."""

_RULES = (
    # A debugger that a dying server calls may lack a library, too; it is the loader's exit that
    # tells. "cannot open shared object file" is missing; what is there and unfit says why.
    _rule(
        Cause.LIBRARY_MISSING,
        "error while loading shared libraries: ",
        r"error while loading shared libraries: .*No such file",
        LOADER_FAILED,
    ),
    _rule(Cause.LIBRARY_BROKEN, "error while loading shared libraries: ", code=LOADER_FAILED),
    _rule(Cause.LIBRARY_BROKEN, "symbol lookup error: ", code=LOADER_FAILED),
    _rule(Cause.LIBRARY_BROKEN, "' not found (required by ", code=1),  # a version of glibc
    _rule(Cause.GPU_MEMORY, "malloc failed: out of memory", r"(cuda|hip|musa)Malloc failed"),
    _rule(Cause.GPU_MEMORY, "cuda error: out of memory"),
    _rule(Cause.GPU_MEMORY, "erroroutofdevicememory"),
    _rule(
        Cause.GPU_MEMORY, "unable to allocate ", rf"unable to allocate (?!{HOST_BUFFER})\w+ buffer"
    ),
    _rule(
        Cause.GPU_MEMORY,
        " buffer of size",
        rf"failed to allocate (?!{HOST_BUFFER}|output)\w+ buffer of size",
    ),
    _rule(Cause.HOST_MEMORY, "std::bad_alloc"),
    _rule(Cause.HOST_MEMORY, "insufficient memory (attempted to allocate"),
    _rule(
        Cause.HOST_MEMORY,
        " buffer",
        rf"(unable|failed) to allocate (output|{HOST_BUFFER}\w*) buffer",
    ),
    _rule(Cause.HOST_MEMORY, "mmap failed: cannot allocate memory"),
    _rule(Cause.GPU_FAILED, "cuda error: "),
    # The words before an abort may be lost with the thread that writes them: then this is left.
    _rule(Cause.GPU_MEMORY, "ggml_cuda_pool_", r"ggml_cuda_pool_(?:leg|vmm)(?:::|\d+)alloc"),
    _rule(Cause.GPU_FAILED, ": cuda error", r"\.cu:\d+: CUDA error$"),
    _rule(Cause.MODEL_UNKNOWN, "unknown model architecture: '"),
    _rule(Cause.MODEL_UNKNOWN, "this gguf file is version "),
    _rule(Cause.MODEL_UNKNOWN, " is no longer supported", r"GGUFv\d+ is no longer supported"),
    _rule(Cause.MODEL_MISSING, "failed to open ", r"failed to open .*(No such file|Not a direct)"),
    _rule(Cause.MODEL_UNREADABLE, "failed to open ", r"failed to open .*Permission denied"),
    _rule(
        Cause.MODEL_CORRUPT,
        "not within the file bounds, ",
        r"not within the file bounds, \w+ is corrupted or incomplete",
    ),
    _rule(Cause.MODEL_CORRUPT, "invalid magic characters"),
    _rule(
        Cause.MODEL_CORRUPT,
        "gguf_init_from_reader",
        r"gguf_init_from_reader\w*: (failed|invalid|bad)",
    ),
    _rule(Cause.MODEL_CORRUPT, "wrong number of tensors"),
    _rule(Cause.PORT_IN_USE, "address already in use"),
    _rule(Cause.CANNOT_LISTEN, "couldn't bind http server socket"),
    _rule(Cause.BAD_FLAG, "error: ", r"error: (invalid|unknown) argument: .+"),
    _rule(Cause.BAD_FLAG, "error while handling argument "),
    _rule(Cause.BAD_FLAG, " requires flash_attn "),
    _rule(Cause.CRASHED, "ggml_assert(", r"GGML_ASSERT\(.*failed"),
)
_STAMP = re.compile(r"^[\d.]+ [A-Z] \s*")
_ERROR = re.compile(r"^[\d.]+ E ")
_PORT = re.compile(r"(?:port\W{0,2}|:|', )(\d{2,5})\b", re.IGNORECASE)
_PORTS_MAX = 4
_TOLD_TO_END = "cleaning up before exit"
_LAST_LINES = 200
_LAST_ERRORS = 12
_LINE_MAX_CHARS = 500
_WORDS_MAX_CHARS = 200


def diagnose(ending: Ending) -> Diagnosis:
    """The most telling cause of an end. Total: every ending has one."""
    recent = [line[:_LINE_MAX_CHARS] for line in ending.lines[-_LAST_LINES:]]
    if ending.code == 0:
        return _exited_cleanly(ending, recent)
    if (found := _said_by(ending, recent)) is not None:
        return found
    cause = _cause_of_exit(ending)
    if cause is Cause.HOST_MEMORY:
        return Diagnosis(cause, f"{ending.words}: {_who_killed(ending.oom_kills)}")
    if cause is Cause.ILLEGAL_INSTRUCTION:
        return Diagnosis(cause, f"{ending.words}: it was built for another processor")
    # Who was killed did not say why: its last line was about something else.
    last = "" if cause in {Cause.KILLED, Cause.UNKNOWN} else _last_words(ending, recent)
    return Diagnosis(cause, f"{ending.words}: {last}" if last else ending.words)


def may_be_oom_kill(code: int | None, signal: int | None) -> bool:
    """Whether the kernel's OOM killer could have ended it so; an unknown status may hide it."""
    return signal == SIGKILL or code == _SIGNALLED + SIGKILL or code is signal is None


def with_holder(ending: Ending, holder: str) -> Diagnosis:
    """The diagnosis of a process that could not listen, where a sentence names who holds a port."""
    return Diagnosis(Cause.PORT_IN_USE, f"{ending.words}: {holder}")


def _exited_cleanly(ending: Ending, recent: Sequence[str]) -> Diagnosis:
    """Status 0. llama-server ends so on SIGTERM, and says that it was not its own idea."""
    if any(_TOLD_TO_END in line for line in recent[-_LAST_ERRORS:]):
        reason = f"{ending.words}: it was told to end (SIGTERM or SIGINT)"
        return Diagnosis(Cause.KILLED, reason)
    return Diagnosis(Cause.EXITED, ending.words)


def _said_by(ending: Ending, recent: Sequence[str]) -> Diagnosis | None:
    """What the first rule makes of the last lines."""
    text = "\n".join(recent).lower()
    for rule in _RULES:
        if rule.needle not in text or rule.code not in {None, ending.code}:
            continue
        if ending.was_ready and rule.cause in PERMANENT:
            continue
        for line in recent:
            if rule.pattern.search(line):
                reason = _sentence(ending, rule.cause, _said(line))
                return Diagnosis(rule.cause, reason, _ports(rule.cause, line))
    return None


def _ports(cause: Cause, line: str) -> tuple[int, ...]:
    if cause not in {Cause.PORT_IN_USE, Cause.CANNOT_LISTEN}:
        return ()
    return tuple(dict.fromkeys(map(int, _PORT.findall(line))))[-_PORTS_MAX:]


def _cause_of_exit(ending: Ending) -> Cause:
    if ending.signal is None and ending.code is None:
        return Cause.HOST_MEMORY if ending.oom_kills.group else Cause.UNKNOWN
    signal = ending.signal
    if signal is None and ending.code == _SIGNALLED + SIGKILL:
        signal = SIGKILL
    if signal == SIGKILL and (ending.oom_kills.group or ending.oom_kills.machine):
        return Cause.HOST_MEMORY
    if signal == SIGILL:
        return Cause.ILLEGAL_INSTRUCTION
    if signal in KILLING:
        return Cause.KILLED
    return Cause.EXITED if signal is None else Cause.CRASHED


def _who_killed(oom_kills: OomKills) -> str:
    if not oom_kills.group:
        return "most likely by the kernel, which killed for memory at that time"
    if oom_kills.limit_bytes is None:
        return "the kernel killed it, for the machine was out of memory"
    limit = f"{oom_kills.limit_bytes / 2**20:.0f} MiB"
    return f"the kernel killed it for memory; its control group may use {limit}"


def _last_words(ending: Ending, recent: Sequence[str]) -> str:
    """The first of its last errors, which the others follow from; else the last line."""
    errors = [line for line in recent[-_LAST_ERRORS:] if _ERROR.match(line)]
    if errors and ending.signal is None:
        return _said(errors[0])
    return next((_said(line) for line in reversed(recent) if line.strip()), "")


def _sentence(ending: Ending, cause: Cause, said: str) -> str:
    """The cause, unless its own words say it already, and those words."""
    label = "" if cause.value in said.lower() else f"{cause.value}: "
    return f"{ending.words}: {label}{said}"


def _said(line: str) -> str:
    """A log line without llama-server's time stamp, level and padding, cut to a sentence."""
    words = re.sub(r"\s+", " ", _STAMP.sub("", line)).strip()
    return words if len(words) <= _WORDS_MAX_CHARS else words[: _WORDS_MAX_CHARS - 1] + "…"
