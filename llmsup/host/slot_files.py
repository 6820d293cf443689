"""The files of saved slots, and the one that tells what is in them.

They hold conversations: private to this user, and gone as soon as they are of no use. A server that
is given a file which is cut off dies of it, so a file is one of ours only as it was left.
"""

import os
import shutil
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from llmsup.core.warmth import Saved
from llmsup.host import procfs
from llmsup.host.replace import fingerprint
from llmsup.host.sealed import Sealed
from llmsup.services.llama_slots import HEAD_BYTES, parse_tokens, words_bytes

VERSION = 1
MAX_BYTES = 1024 * 1024


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was saved during the boot `boot_id`: of another one the files may not be whole."""

    boot_id: str
    saves: tuple[Saved, ...] = ()


_FILE = Sealed("slots", Index, VERSION, MAX_BYTES)


def load(path: Path) -> tuple[Saved, ...]:
    """What was saved during this boot; nothing where that cannot be trusted."""
    index = _FILE.load(path)
    return index.saves if index is not None and index.boot_id == procfs.boot_id() else ()


def save(path: Path, saves: Iterable[Saved]) -> None:
    """Replace the index. Raises OSError."""
    _FILE.save(path, Index(procfs.boot_id(), tuple(saves)))


def read(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The fingerprint of a file, and the tokens in it. Makes it private.

    Raises OSError, and ValueError for what is no saved slot of text.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(file, "rb") as stream:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(file, 0o600)
        words = stream.read(words_bytes(stream.read(HEAD_BYTES), found.st_size))
    return fingerprint(path), parse_tokens(words)


def free_bytes(directory: Path) -> int:
    """What may still be written there. Raises OSError."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize


def remove(directory: Path, files: Iterable[str]) -> None:
    """Remove these, as far as that is possible."""
    for file in files:
        with suppress(OSError):
            (directory / file).unlink()


def remove_others(directory: Path, files: Collection[str]) -> None:
    """Remove what is there beside these."""
    with suppress(OSError):
        remove(directory, [each.name for each in directory.iterdir() if each.name not in files])


def remove_all(directory: Path, index: Path) -> None:
    """Remove everything, of this boot or another."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        _FILE.forget(index)
