"""Replacing a file so that readers see the old or the new one, and nothing between.

A full disk does not prevent it. The file that is replaced stays behind as a spare, which the next
time is overwritten and exchanged with the live one: it has its blocks and its name already.
"""

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

from llmsup.host.private import NotOursError, open_private

BLOCK_BYTES = 4096
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = frozenset({errno.ENOENT, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_libc = ctypes.CDLL(None, use_errno=True)


def replace_file(path: Path, spare: Path, content: bytes) -> None:
    """Put a file with `content` in the place of `path`, private to this user. Raises OSError.

    `spare` is on the same file system. Blanks are added to whole blocks, and no fewer than before,
    so that the spare never has to grow: `content` is of a kind in which they mean nothing.
    """
    file = _opened(spare)
    try:
        size = max(os.fstat(file).st_size, -(-len(content) // BLOCK_BYTES) * BLOCK_BYTES)
        _write(file, content.ljust(size))
    finally:
        os.close(file)
    if not _exchange(spare, path):
        spare.rename(path)
    with suppress(OSError):  # without a spare the next replacement needs room, that is all
        _reserve(spare, size)


def fingerprint(path: Path) -> tuple[int, ...]:
    """Of the file at `path`, without reading it: another one once it is replaced or written to.

    Empty where there is none.
    """
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _opened(spare: Path) -> int:
    try:
        return open_private(spare, os.O_WRONLY)
    except NotOursError:
        spare.unlink()
        return open_private(spare, os.O_WRONLY)


def _write(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _exchange(one: Path, other: Path) -> bool:
    """Swap two files at once; False where one is missing or the file system cannot."""
    rename = getattr(_libc, "renameat2", None)
    if rename is None:
        return False
    one_name, other_name = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, one_name, _AT_FDCWD, other_name, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _reserve(spare: Path, size: int) -> None:
    file = _opened(spare)
    try:
        os.posix_fallocate(file, 0, size)
    finally:
        os.close(file)
