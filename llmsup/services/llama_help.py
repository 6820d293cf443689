"""What a llama-server understands, read from what it prints on `--help`."""

import re
from dataclasses import dataclass

_HEAD = re.compile(r" {0,4}(-.*)")
_FLAG = re.compile(r"(?<!\S)--?[A-Za-z][\w-]*(?=[\s,]|$)")
_LEVELS = re.compile(r"--verbosity.*?- 4: trace", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of one build, and which of them are switches that take no value.

    `has_trace`: of the levels of verbosity 4 is the one that tells of buffers but not of tokens.
    """

    known: frozenset[str]
    bare: frozenset[str] = frozenset()
    has_trace: bool = False


def parse(text: str) -> Flags | None:
    """The flags that a help text lists; None where it is no help text of a llama-server.

    Each has a line that begins with its names and what stands for its value:
    `-c,    --ctx-size N     size of the prompt context`.
    """
    known: set[str] = set()
    bare: set[str] = set()
    for line in text.splitlines():
        if (match := _HEAD.fullmatch(line.expandtabs())) is None:
            continue
        head = re.split(r"\s{2,}", re.sub(r",\s+", ", ", match[1]))[0]
        names = list(_FLAG.finditer(head))
        known.update(name[0] for name in names)
        if names and not head[names[-1].end() :].strip():
            bare.update(name[0] for name in names)
    if not {"--model", "--port", "--ctx-size"} <= known:
        return None
    return Flags(frozenset(known), frozenset(bare), has_trace=bool(_LEVELS.search(text)))
