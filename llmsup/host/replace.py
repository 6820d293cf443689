"""Replacing a file so that readers see the old or the new one, and nothing between."""

import os
from pathlib import Path


def replace_file(path: Path, temporary: Path, content: bytes) -> None:
    """Put a new file with `content` in the place of `path`, private to this user.

    `temporary` is on the same file system. Raises OSError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
        file.write(content)
    temporary.rename(path)


def fingerprint(path: Path) -> tuple[int, ...]:
    """Of the file at `path`, without reading it: another one once it is replaced or written to.

    Empty where there is none.
    """
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
