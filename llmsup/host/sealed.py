"""A value in a file of its own: whole or not at all, versioned, with a checksum.

One that cannot be trusted is set aside and said, never fatal.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from llmsup.host.replace import replace_file

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sealed(Generic[T]):
    """A kind of such files. `name` is the key that the value stands under."""

    name: str
    type: type[T]
    version: int
    max_bytes: int

    def save(self, path: Path, value: T) -> None:
        """Replace the file. Not synced to the disk. Raises OSError."""
        content = msgspec.json.encode(value)
        file = {
            "version": self.version,
            "sha256": hashlib.sha256(content).hexdigest(),
            self.name: msgspec.Raw(content),
        }
        replace_file(path, _spare(path), msgspec.json.encode(file))

    def forget(self, path: Path) -> None:
        """Remove the file. Raises OSError."""
        _spare(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def load(self, path: Path) -> T | None:
        """What was saved; None where there is no such file or it is set aside."""
        try:
            return self.read(path)
        except (OSError, ValueError, RecursionError) as error:
            _set_aside(path, error)
            return None

    def read(self, path: Path) -> T | None:
        """The same for a reader that leaves the file where it is.

        Raises OSError, ValueError or RecursionError where it cannot be read or trusted.
        """
        try:
            if path.stat().st_size > self.max_bytes:
                raise ValueError("too large")
            file = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        except FileNotFoundError:
            return None
        version, digest, content = (
            file.get(key, msgspec.Raw(b"null")) for key in ("version", "sha256", self.name)
        )
        found = msgspec.json.decode(version, type=int)
        if found != self.version:
            raise ValueError(f"its version is {found}, not {self.version}")
        if hashlib.sha256(bytes(content)).hexdigest() != msgspec.json.decode(digest, type=str):
            raise ValueError("its checksum is wrong")
        return msgspec.json.decode(content, type=self.type)


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
