"""Crash bundles: a directory for each death, in place whole or not at all, the last ones kept.

`20251125T204012.123Z-chat-3` is the death of generation 3 of chat. A name with a dot in front is
one that was never finished.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

DEATH = "death.json"
OUTPUT = "output.log"
"""The files of a bundle: `DeathInfo` of control.wire, and what the process said last."""


@dataclass(frozen=True)
class Bundle:
    """One that is there; `path` is its directory."""

    path: Path
    service: str
    generation: int


def name(time: float, service: str, generation: int) -> str:
    """The directory of a death at Unix time `time`; names sort by time."""
    moment = datetime.fromtimestamp(time, UTC)
    return f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03d}Z-{service}-{generation}"


def found(directory: Path) -> list[Bundle]:
    """All that are there, the newest first."""
    try:
        names = sorted(os.listdir(directory), reverse=True)  # noqa: PTH208 (names, not paths)
    except OSError:
        return []
    return list(_bundles(directory, names))


def keep(directory: Path, bundle: str, files: Mapping[str, bytes]) -> None:
    """Write the files, for their owner only. Raises OSError, with nothing left behind."""
    directory.mkdir(mode=0o700, exist_ok=True)
    for unfinished in directory.glob(".*"):  # of a daemon that was killed: there is one writer
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary = directory / f".{bundle}"
    try:
        temporary.mkdir(mode=0o700)
        for file_name, content in files.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(temporary / file_name, flags, 0o600), "wb") as file:
                file.write(content)
        temporary.rename(directory / bundle)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def prune(directory: Path, service: str, keep_count: int, newest: str) -> None:
    """Remove all but the last of a service, and never `newest`: the wall clock may have jumped."""
    older = [each for each in found(directory) if each.service == service]
    older = [each for each in older if each.path.name != newest]
    for each in older[keep_count - 1 :]:
        shutil.rmtree(each.path, ignore_errors=True)


def _bundles(directory: Path, names: list[str]) -> Iterator[Bundle]:
    for each in names:
        stamp, _, rest = each.partition("-")
        service, _, generation = rest.rpartition("-")
        if stamp.endswith("Z") and not stamp.startswith(".") and generation.isdecimal():
            yield Bundle(directory / each, service, int(generation))
