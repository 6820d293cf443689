"""What a daemon remembers of its services for the next one: one file, whole or not at all.

Processes are not remembered here: each carries its mark and the digest of its launch, and is found
by them. This file holds what cannot be read off a process. It is versioned and carries a checksum;
one that cannot be trusted is set aside, never fatal.
"""

from pathlib import Path

import msgspec
from msgspec.structs import replace

from llmsup.host import procfs
from llmsup.host.sealed import Sealed

VERSION = 1
MAX_BYTES = 4 * 1024 * 1024


class Remembered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One service. `deaths` are monotonic seconds, good for one boot of the machine.

    `asked`: what the operator asked where that is not what the profile wants, "up" or "down";
    where nobody asked and it was unloaded, "idle" because no request came, "evicted" to make room.
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


_FILE = Sealed("memory", Memory, VERSION, MAX_BYTES)


def save(path: Path, memory: Memory) -> None:
    """Replace the file. Not synced to the disk: after a power cut there is nothing to adopt.

    Raises OSError.
    """
    _FILE.save(path, memory)


def forget(path: Path) -> None:
    """Remove the file. Raises OSError."""
    _FILE.forget(path)


def load(path: Path, profile_path: str) -> Memory:
    """What was saved during this boot; nothing where that cannot be trusted.

    Of services under another profile: what their processes are known by, and nothing else.
    """
    nothing = Memory(procfs.boot_id(), profile_path)
    memory = _FILE.load(path)
    if memory is None or memory.boot_id != nothing.boot_id:
        return nothing
    if memory.profile_path == profile_path:
        return memory
    services = {name: replace(each, asked="", deaths=()) for name, each in memory.services.items()}
    return replace(nothing, services=services)
