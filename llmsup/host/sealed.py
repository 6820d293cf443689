"""A small file of state: versioned, with a checksum, and replaced whole or not at all.

One that cannot be trusted is set aside, never fatal.
"""

import hashlib
import logging
from pathlib import Path
from typing import TypeVar

import msgspec

from llmsup.host.replace import replace_file

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 1024 * 1024


def save(path: Path, version: int, content: bytes, *, key: str) -> None:
    """Replace the file; `content` is JSON, kept under `key`. Not synced to the disk.

    Raises OSError.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    file = {"version": version, "sha256": sha256, key: msgspec.Raw(content)}
    replace_file(path, _spare(path), msgspec.json.encode(file))


def load(path: Path, version: int, kind: type[T], *, key: str) -> T | None:
    """What was saved; None where there is nothing that can be trusted."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        return _decode(path.read_bytes(), version, kind, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _set_aside(path, error)
        return None


def forget(path: Path) -> None:
    """Remove the file. Raises OSError."""
    _spare(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _decode(written: bytes, version: int, kind: type[T], key: str) -> T:
    """Raises ValueError."""
    file = msgspec.json.decode(written, type=dict[str, msgspec.Raw])
    if not {"version", "sha256", key} <= file.keys():
        raise ValueError("something is missing")
    found = msgspec.json.decode(file["version"], type=int)
    if found != version:
        raise ValueError(f"its version is {found}, not {version}")
    content = bytes(file[key])
    if hashlib.sha256(content).hexdigest() != msgspec.json.decode(file["sha256"], type=str):
        raise ValueError("its checksum is wrong")
    return msgspec.json.decode(content, type=kind)


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
