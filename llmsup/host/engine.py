"""What is known of a llama-server: its build and its flags. It is asked once, and that is kept.

It is a program of the user's choice: it may be a script that starts one, hang, crash or print
without end. Then nothing is known of it, which is an answer, too.
"""

import hashlib
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from llmsup import __version__
from llmsup.host.process import inherited
from llmsup.host.replace import fingerprint, replace_file
from llmsup.services.llama_help import Flags, parse

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
OUTPUT_MAX_BYTES = 1024 * 1024
_KEPT_MAX = 16
_BUILD_MAX = 80


@dataclass(frozen=True, slots=True)
class Engine:
    """A llama-server. `flags`: None where it did not tell them.

    `build` tells builds apart, also those that name no version; it has none of the file's times,
    so that the same one installed anew is the same.
    """

    build: str
    flags: Flags | None = None


class _Answer(msgspec.Struct, frozen=True):
    """What a program said, which `identity` tells from what will be at its place later."""

    identity: str
    engine: Engine


_ANSWERS = msgspec.json.Decoder(dict[str, _Answer])


def look(binary: str, cache: Path) -> Engine | None:
    """What `learn` found out about `binary`; None where it was not asked yet."""
    known = _read(cache).get(binary)
    return known.engine if known is not None and known.identity == identity(binary) else None


def learn(binary: str, cache: Path) -> Engine:
    """Ask `binary`, unless the file `cache` has what it said. May block for twice TIMEOUT_S."""
    if (known := look(binary, cache)) is not None:
        return known
    asked = identity(binary)
    told = _output(binary, "--help")
    flags = None if told is None else parse(told)
    version = _output(binary, "--version") if flags is not None else None
    engine = Engine(_build(binary, version or ""), flags)
    if flags is None:
        log.info("%s does not tell its flags: it is taken to know all of them", binary)
    if told is None:
        return engine  # it may have been the machine: it is asked again another time
    others = [(path, each) for path, each in _read(cache).items() if path != binary]
    answers = dict([*others, (binary, _Answer(asked, engine))][-_KEPT_MAX:])
    with suppress(OSError):  # it is asked again, then
        replace_file(cache, cache.with_suffix(".new"), msgspec.json.encode(answers))
    return engine


def _read(cache: Path) -> dict[str, _Answer]:
    try:
        return _ANSWERS.decode(cache.read_bytes())
    except (OSError, ValueError):
        return {}


def identity(binary: str) -> str:
    """Tells `binary` from what was or will be at its place."""
    return _hash([__version__, *((path, fingerprint(path)) for path in files_of(binary))])


def _build(binary: str, version: str) -> str:
    """Its own words, such as "version: 6123 (ab12cd3)", and what tells apart the ones without."""
    first = next((line.strip() for line in version.splitlines() if "version" in line), "")
    first = first.removeprefix("version:").strip()[:_BUILD_MAX]
    mark = _hash((path.name, fingerprint(path)[2:3]) for path in files_of(binary))[:8]
    return f"{first} {mark}".strip()


def files_of(binary: str) -> list[Path]:
    """The program and the libraries beside it, which most of it is in."""
    program = Path(os.path.realpath(binary))
    with suppress(OSError):
        return [program, *sorted(program.parent.glob("lib*.so*"))]
    return [program]


def _hash(parts: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode(errors="surrogateescape")).hexdigest()


def _output(binary: str, argument: str) -> str | None:
    """What it prints, the beginning of it; None where it does not come to an end of that.

    It gets no card to look for: that takes time, and wakes one that sleeps.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "wb") as output:
        try:
            process = subprocess.Popen(
                [binary, argument],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**inherited(), "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        except OSError as error:
            log.info("cannot start %s: %s", binary, error.strerror)
            return None
        output.close()  # so that the other end sees when it is the last to have it
        said = _beginning(reading)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started; it is not reaped yet
        process.wait()
    if said is None:
        log.info("%s %s did not end within %g s", binary, argument, TIMEOUT_S)
    return said


def _beginning(pipe: int) -> str | None:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    deadline = time.monotonic() + TIMEOUT_S
    said = b""
    while len(said) < OUTPUT_MAX_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        said += chunk
    return said.decode(errors="replace")
