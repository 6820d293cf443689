"""Log files that children append to: rotated under their hands, and read for people.

The writer keeps its file open (O_APPEND) and knows nothing of rotation. `chat.log` is the live
file; older parts are `chat.log.1`, `chat.log.2`, …. All in a row are what was written, byte by
byte: a part may end within a line.
"""

import ctypes
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from llmsup.host.private import open_private

LINE_MAX_CHARS = 4096
_CHUNK_BYTES = 1024 * 1024
_FALLOC_FL_COLLAPSE_RANGE = 0x08
_LOCK_TIMEOUT_S = {fcntl.LOCK_EX: 0.1, fcntl.LOCK_SH: 2.0}
_NO_COLLAPSE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links
    r"|[ -/]*[0-~])"
)
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def size_bytes(path: Path) -> int:
    """The size of the live file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def append(path: Path, line: str) -> None:
    """Add a line of ours, with the time. Raises OSError where the log cannot be opened."""
    file = open_private(path, os.O_WRONLY | os.O_APPEND)
    try:
        with suppress(OSError):  # a full disk costs the line
            os.write(file, f"{line}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}\n".encode())
    finally:
        os.close(file)


def open_output(path: Path) -> int:
    """The log, for a child to append to; /dev/null where it cannot be opened.

    Raises OSError where nothing can be opened.
    """
    try:
        return open_private(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        if error.errno in _SHORTAGE:
            raise
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def rotate(path: Path, max_bytes: int, keep: int) -> None:
    """Move the beginning of the live file to `.1`, `.2`, … until it is not above `max_bytes`.

    No line is lost, whatever the writer does meanwhile; data that `keep` parts cannot hold is
    dropped, oldest first. Where the filesystem cannot cut off the beginning of a file (tmpfs,
    btrfs) it is copied and emptied, and what is written in between those two is lost.

    Raises OSError (the disk is full) with the live file intact. Blocks while data is copied.
    """
    if size_bytes(path) <= max_bytes or not path.is_file():
        return
    with _opened(path, os.O_RDWR, fcntl.LOCK_EX) as live:
        found = os.fstat(live)
        block = os.fstatvfs(live).f_bsize
        part = max(block, max_bytes - max_bytes % block)
        surplus = min(-(-(found.st_size - max_bytes) // part), (found.st_size - 1) // part)
        dropped = max(0, surplus - keep) * part  # never stored, only to be rotated away at once
        stored = 0
        try:
            if dropped:
                _collapse(live, dropped)
            for _ in range(min(surplus, keep)):
                os.close(_store(path, live, 0, part, keep))
                stored = part
                _collapse(live, part)
                stored = 0
        except OSError as error:
            if error.errno not in _NO_COLLAPSE:
                raise
            _copy_and_truncate(path, live, max(dropped, stored), part, keep)


def tail(path: Path, lines: int, *, max_bytes: int = _CHUNK_BYTES) -> list[str]:
    """The last `lines` lines across the parts, fit for a terminal; at most `max_bytes` are read."""
    with _opened(path, os.O_RDONLY, fcntl.LOCK_SH):
        pieces = _last_lines(path, lines, max_bytes)
    if pieces and not pieces[-1]:
        pieces.pop()
    return [_clean(piece) for piece in pieces[max(0, len(pieces) - lines) :]]


def follow(path: Path, poll_s: float = 0.25, *, lines: int = 0) -> Iterator[str]:
    """The last `lines` lines, then each further one once it is complete; never ends.

    Rotation goes unnoticed. A file that is not there yet is waited for.
    """
    with _opened(path, os.O_RDONLY, fcntl.LOCK_SH):
        *complete, pending = _last_lines(path, lines, _CHUNK_BYTES) or [b""]
        position, newest = size_bytes(path), _identity(_part(path, 1))
    yield from map(_clean, complete[max(0, len(complete) - lines) :])
    while True:
        with _opened(path, os.O_RDONLY, fcntl.LOCK_SH):
            news, position = _news(path, position, newest)
            newest = _identity(_part(path, 1))
        if not news:
            time.sleep(poll_s)
            continue
        *complete, pending = (pending + news).split(b"\n")
        yield from map(_clean, complete)
        if len(pending) > _CHUNK_BYTES:
            yield _clean(pending)
            pending = b""


def lines_between(path: Path, start: int, end: int, lines: int, max_bytes: int) -> list[str]:
    """The last lines of those two offsets, cleaned; none where they cannot be read.

    A live file that was rotated since is shorter than it was; what is left of it is taken.
    """
    end = min(end, size_bytes(path))
    try:
        written = _read(path, max(start if start <= end else 0, end - max_bytes), end)
    except OSError:  # a death is told whether or not its last words can be read
        return []
    cleaned = (_clean(line).rstrip() for line in written.split(b"\n"))
    return [line for line in cleaned if line][-lines:]


def first_lines(path: Path, start: int, end: int, max_bytes: int) -> list[str]:
    """The lines that begin after `start`, cleaned, of at most so many bytes up to `end`.

    None where the live file was rotated so far since that they are not in it.
    """
    try:
        written = _read(path, start, min(end, start + max_bytes))
    except OSError:
        return []
    return [_clean(line).rstrip() for line in written.split(b"\n")]


def after_last(path: Path, beginning: str, end: int, max_bytes: int = _CHUNK_BYTES) -> int:
    """The offset after the last line before `end` that begins so; 0 where there is none."""
    end = min(end, size_bytes(path))
    first = max(0, end - max_bytes)
    try:
        written = b"\n" + _read(path, first, end)
    except OSError:
        return 0
    found = written.rfind(b"\n" + beginning.encode())
    line_end = written.find(b"\n", found + 1)
    return first + line_end if found >= 0 and line_end > 0 else 0


# --- rotation


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _collapse(live: int, length: int) -> None:
    """Cut `length` bytes off the beginning; the writer goes on at the new end."""
    if _libc.fallocate(live, _FALLOC_FL_COLLAPSE_RANGE, 0, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _store(path: Path, live: int, start: int, length: int, keep: int) -> int:
    """Copy a range of the live file to `.1`, after the older parts moved up. Its descriptor."""
    copy = path.with_name(f"{path.name}.new")
    copy.unlink(missing_ok=True)
    # What would be dropped goes first: on a full disk its place is the only one there is.
    surplus = keep
    while _part(path, surplus).exists():
        _part(path, surplus).unlink()
        surplus += 1
    stored = open_private(copy, os.O_WRONLY | os.O_EXCL)
    try:
        _copy(live, stored, start, length)
        for number in range(keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                _part(path, number).replace(_part(path, number + 1))
        copy.replace(_part(path, 1))
    except OSError:
        os.close(stored)
        copy.unlink(missing_ok=True)
        raise
    return stored


def _copy(source: int, sink: int, start: int, length: int) -> int:
    """Copy up to `length` bytes, as far as there are any; how many."""
    copied = 0
    while copied < length:
        chunk = os.pread(source, min(_CHUNK_BYTES, length - copied), start + copied)
        if not chunk:
            break
        view = memoryview(chunk)
        while view:
            view = view[os.write(sink, view) :]
        copied += len(chunk)
    return copied


def _copy_and_truncate(path: Path, live: int, start: int, part: int, keep: int) -> None:
    if keep:
        size = os.fstat(live).st_size
        while size - start > part:
            os.close(_store(path, live, start, part, keep))
            start += part
        newest = _store(path, live, start, size - start, keep)
        try:
            # What was written during the copy; a writer that is always quicker must not keep us.
            _copy(live, newest, size, part)
        finally:
            os.close(newest)
    os.ftruncate(live, 0)


# --- reading


@contextmanager
def _opened(path: Path, flags: int, lock: int) -> Iterator[int]:
    """The live file, locked, so that readers do not see it half rotated; -1 if there is none.

    Nobody waits for long: a reader that is stopped while it reads must not stop rotation.
    """
    try:
        file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield -1
        return
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S[lock]
        while not _is_locked(file, lock) and time.monotonic() < deadline:
            time.sleep(0.001)
        yield file
    finally:
        os.close(file)


def _is_locked(file: int, lock: int) -> bool:
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, start: int, end: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(max(0, end - start))
    except FileNotFoundError:
        return b""


def _last_lines(path: Path, lines: int, max_bytes: int) -> list[bytes]:
    """At least `lines` lines where there are that many, then what follows the last newline."""
    data = b""
    number = 0
    file = path
    while file.exists() and len(data) < max_bytes and data.count(b"\n") <= lines:
        size = size_bytes(file)
        start = max(0, size - (max_bytes - len(data)))
        data = _read(file, start, size) + data
        number += 1
        file = _part(path, number)
    pieces = data.split(b"\n")
    is_cut = len(data) >= max_bytes and len(pieces) > 2
    return pieces[1:] if is_cut else pieces


def _identity(part: Path) -> tuple[int, int] | None:
    """Tells parts apart whatever they are renamed to."""
    try:
        found = part.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _news(path: Path, position: int, newest: tuple[int, int] | None) -> tuple[bytes, int]:
    """What came after `position` of the live file as it was when `newest` was its part `.1`."""
    number = 1
    while (identity := _identity(_part(path, number))) not in (None, newest):
        number += 1
    if newest is not None and identity is None:
        position = 0  # so much was rotated meanwhile that our place in it is gone
    news = b""
    for part in (_part(path, older) for older in range(number - 1, 0, -1)):
        size = size_bytes(part)
        news += _read(part, position, size)
        position = max(0, position - size)
    size = size_bytes(path)
    if position > size:
        position = 0  # emptied by somebody
    end = min(size, position + _CHUNK_BYTES)
    return news + _read(path, position, end), end


def _clean(line: bytes, max_chars: int = LINE_MAX_CHARS) -> str:
    """A line that cannot upset a terminal: of a redrawn progress bar the last picture."""
    text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
    text = _CONTROL.sub("", _ESCAPE.sub("", text))
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"
