"""What a daemon remembers of its services for the next one: one file, whole or not at all.

Processes are not remembered here: each carries its mark and the digest of its launch, and is found
by them. This file holds what cannot be read off a process. It is versioned and carries a checksum;
one that cannot be trusted is set aside, never fatal.
"""

import hashlib
import logging
from pathlib import Path

import msgspec

from llmsup.host import procfs
from llmsup.host.replace import replace_file

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 4 * 1024 * 1024


class Remembered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One service. `deaths` are monotonic seconds, good for one boot of the machine.

    `asked`: what the operator asked where that is not what the profile wants, "up" or "down".
    `measured_bytes`: what the card lost to the generation, None where that is not known.
    """

    asked: str
    generation: int
    restarts: int
    deaths: tuple[float, ...] = ()
    port: int | None = None
    measured_bytes: int | None = None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All services by name, as they were during the boot `boot_id` with one profile."""

    boot_id: str
    profile_path: str
    services: dict[str, Remembered] = {}


class _File(msgspec.Struct, frozen=True):
    version: int
    sha256: str
    memory: msgspec.Raw


def save(path: Path, memory: Memory) -> None:
    """Replace the file. Not synced to the disk: after a power cut there is nothing to adopt.

    Raises OSError.
    """
    content = msgspec.json.encode(memory)
    file = _File(VERSION, hashlib.sha256(content).hexdigest(), msgspec.Raw(content))
    replace_file(path, _spare(path), msgspec.json.encode(file))


def forget(path: Path) -> None:
    """Remove the file. Raises OSError."""
    _spare(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def load(path: Path, profile_path: str) -> Memory:
    """What was saved during this boot with this profile; nothing where that cannot be trusted."""
    nothing = Memory(procfs.boot_id(), profile_path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        memory = _decode(path.read_bytes())
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, RecursionError) as error:
        _set_aside(path, error)
        return nothing
    is_ours = (memory.boot_id, memory.profile_path) == (nothing.boot_id, profile_path)
    return memory if is_ours else nothing


def _decode(content: bytes) -> Memory:
    """Raises ValueError."""
    file = msgspec.json.decode(content, type=_File)
    if file.version != VERSION:
        raise ValueError(f"its version is {file.version}, not {VERSION}")
    if hashlib.sha256(bytes(file.memory)).hexdigest() != file.sha256:
        raise ValueError("its checksum is wrong")
    return msgspec.json.decode(file.memory, type=Memory)


def _spare(path: Path) -> Path:
    return path.with_suffix(".spare")


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_suffix(".corrupt")
    try:
        path.rename(aside)
    except OSError as failure:
        log.warning("%s cannot be read (%s) nor set aside (%s)", path, error, failure)
    else:
        log.warning("%s cannot be read (%s); it is kept as %s", path, error, aside)
