"""The header of a model on the disk, of all its parts, as it is now.

Looked at before a server is started: what no engine could load is said in one sentence, with no
process spawned. Whatever an engine might know better (a newer format, other types, an architecture
that we have never heard of) is left to the engine: builds differ, and a doubt of ours must not
keep a good model from loading.
"""

import errno
import os
import stat
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from llmsup.config.files import kind
from llmsup.config.models import parts_of
from llmsup.config.wording import one_line
from llmsup.core.gguf import Header, Model, joined
from llmsup.core.gguf_header import parse
from llmsup.core.gguf_reader import HEADER_MAX_BYTES
from llmsup.errors import Flaw, LaunchError, ModelFileError

FIRST_READ_BYTES = 12 * 1024 * 1024
READ_GROWTH = 4
CACHED_MODELS = 64

HINTS = {
    Flaw.MISSING: "put it back, or name another `model`",
    Flaw.FORMAT: "a little-endian GGUF file of version 2 or 3 is needed",
    Flaw.TRUNCATED: "download it again",
    Flaw.CORRUPT: "download it again",
}
"""What to do about a flaw."""
_MISSING_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


class Identity(NamedTuple):
    """A file as it was; when it is written to, it is another."""

    path: Path
    file_bytes: int
    mtime_ns: int
    inode: int


def look(path: Path) -> Model:
    """The model whose first file is `path`. One that was looked at before costs a stat a part.

    Raises ModelFileError.
    """
    return read(tuple(_identity(part) for part in parts_of(path)))


def require_loadable(path: Path) -> None:
    """Raises LaunchError, a permanent one, where it is certain that no engine can load `path`."""
    try:
        look(path)
    except ModelFileError as error:
        if error.is_certain:
            hint = HINTS.get(error.flaw, "")
            raise LaunchError(error.message, hint=hint, permanent=True, flaw=error.flaw) from None


@lru_cache(CACHED_MODELS)
def read(parts: tuple[Identity, ...]) -> Model:
    """The model of these files, read once as long as they are the same. Raises ModelFileError."""
    headers = [_header(part.path) for part in parts]
    try:
        return joined(headers)
    except ModelFileError as error:
        raise _named(error, parts[0].path) from None


def _identity(path: Path) -> Identity:
    try:
        found = path.stat()
    except OSError as error:
        raise _os_error(error, path) from None
    return Identity(path, found.st_size, found.st_mtime_ns, found.st_ino)


def _header(path: Path) -> Header:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: a pipe would block
            raise ModelFileError(Flaw.FORMAT, f"it is {kind(path)}")
        with closing(_Beginning(path)) as beginning:
            return beginning.header()
    except OSError as error:
        raise _os_error(error, path) from None
    except ModelFileError as error:
        raise _named(error, path) from None


class _Beginning:
    """The first bytes of a file, as many as were needed so far.

    Read, not mapped: a file that is cut off while it is mapped kills who looks at it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._data = b""

    def close(self) -> None:
        os.close(self._file)

    def header(self) -> Header:
        file_bytes = os.fstat(self._file).st_size
        wanted = FIRST_READ_BYTES
        while (header := parse(self._grown(wanted), file_bytes)) is None:
            if len(self._data) < min(wanted, file_bytes) or wanted >= HEADER_MAX_BYTES:
                raise ModelFileError(Flaw.UNREADABLE, "it changes while it is read")
            wanted = min(wanted * READ_GROWTH, HEADER_MAX_BYTES)
        return header

    def _grown(self, wanted: int) -> bytes:
        while len(self._data) < wanted:
            more = os.pread(self._file, wanted - len(self._data), len(self._data))
            if not more:
                break
            self._data = self._data + more if self._data else more
        return self._data


def _named(error: ModelFileError, path: Path) -> ModelFileError:
    return ModelFileError(error.flaw, error.detail, name=one_line(path.name))


def _os_error(error: OSError, path: Path) -> ModelFileError:
    if error.errno in _MISSING_ERRNOS:
        return ModelFileError(Flaw.MISSING, f"there is no {one_line(str(path))}")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ModelFileError(Flaw.UNREADABLE, reason, name=one_line(path.name))
