"""Small files that people point at: read whole, or refused in a sentence."""

import os
import stat
from hashlib import sha256
from pathlib import Path

from llmsup.config.wording import quoted

TEXT_LIMIT_BYTES = 1 << 20


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file of at most 1 MiB, without a byte order mark.

    Raises ValueError with what is wrong with it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{kind(path)}, not a regular file")
        size_bytes = path.stat().st_size
        if size_bytes > TEXT_LIMIT_BYTES:
            raise ValueError(f"too large: {size_bytes} bytes, at most {TEXT_LIMIT_BYTES} are read")
        with path.open("rb") as file:
            data = file.read(TEXT_LIMIT_BYTES)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"not UTF-8 text (line {line})") from None


def kind(path: Path) -> str:
    """What `path` is, in words; symbolic links are followed. Raises OSError."""
    mode = path.stat().st_mode
    words = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    return words.get(stat.S_IFMT(mode), "a device")


def exists(path: Path) -> bool:
    """Whether there is anything at `path` that this user can see. Never raises."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def is_directory(path: Path) -> bool:
    """Whether `path` is a directory that this user can see. Never raises."""
    return exists(path) and path.is_dir()


def located(text: str, base: Path) -> Path:
    """The absolute path that `text` names in a file of the directory `base`; `~` is expanded.

    Raises ValueError for the `~` of a user who is not there.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{quoted(text)}: there is no such home directory; write an absolute path"
        ) from None
    return Path(os.path.normpath(base / path))


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, to see whether it was edited; "" where it cannot be read."""
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
