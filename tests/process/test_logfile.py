import errno
import itertools
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmsup.host import logfile

CHILDREN = Path(__file__).parent.parent / "stubs" / "children.py"
BLOCK = 4096
LINE_BYTES = 100


def last_words(path: Path, offset: int) -> str:
    lines = logfile.lines_between(path, offset, logfile.size_bytes(path), 50, 1 << 16)
    return lines[-1] if lines else ""


def cuts_off_beginnings(directory: Path) -> bool:
    """Whether files there can be collapsed; without that, rotation is by copy and truncate."""
    path = directory / "probe"
    path.write_bytes(bytes(2 * BLOCK))
    with path.open("r+b") as file:
        try:
            logfile._collapse(file.fileno(), BLOCK)
        except OSError:
            return False
        finally:
            path.unlink()
    return True


@pytest.fixture
def log(tmp_path: Path) -> Path:
    if not cuts_off_beginnings(tmp_path):
        pytest.skip("this filesystem cannot cut off the beginning of a file")
    return tmp_path / "chat.log"


@pytest.fixture
def no_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(live: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this filesystem")

    monkeypatch.setattr(logfile, "_collapse", refuse)


def parts(log: Path) -> list[Path]:
    """Oldest first, the live file last."""
    older = itertools.takewhile(
        Path.exists, (log.with_name(f"{log.name}.{number}") for number in itertools.count(1))
    )
    return [*reversed(list(older)), log]


def written(log: Path) -> bytes:
    return b"".join(part.read_bytes() for part in parts(log))


def numbered(first: int, count: int) -> bytes:
    """Lines of `LINE_BYTES`, as the children write them."""
    return "".join(f"{number:010d} {'x' * 88}\n" for number in range(first, first + count)).encode()


def numbers(text: bytes) -> list[int]:
    lines = [line for line in text.split(b"\n") if len(line) == LINE_BYTES - 1]
    return [int(line[:10]) for line in lines]


@contextmanager
def writing(log: Path, mode: str, count_bytes: int) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, str(CHILDREN), mode, "--bytes", str(count_bytes)]
    with log.open("ab") as output, subprocess.Popen(command, stdout=output) as child:
        try:
            yield child
        finally:
            child.kill()


# --- rotation


def test_a_small_log_is_left_alone(log: Path) -> None:
    logfile.rotate(log, max_bytes=BLOCK, keep=3)
    assert not log.exists()

    log.write_bytes(b"x" * BLOCK)
    logfile.rotate(log, max_bytes=BLOCK, keep=3)

    assert parts(log) == [log]


def test_parts_in_a_row_are_what_was_written(log: Path) -> None:
    text = numbered(0, 1000)
    log.write_bytes(text)
    logfile.rotate(log, max_bytes=4 * BLOCK, keep=9)

    assert written(log) == text
    assert log.stat().st_size <= 4 * BLOCK
    assert all(part.stat().st_size <= 4 * BLOCK for part in parts(log))
    assert log.with_name("chat.log.1").stat().st_mode & 0o777 == 0o600


def test_the_oldest_part_goes(log: Path) -> None:
    text = numbered(0, 2000)
    log.write_bytes(text)
    logfile.rotate(log, max_bytes=2 * BLOCK, keep=2)

    assert len(parts(log)) == 3
    assert text.endswith(written(log))
    assert len(written(log)) > 4 * BLOCK


def test_nothing_is_kept_with_keep_0(log: Path) -> None:
    log.write_bytes(numbered(0, 2000))
    logfile.rotate(log, max_bytes=2 * BLOCK, keep=0)

    assert parts(log) == [log]
    assert 0 < log.stat().st_size <= 2 * BLOCK


def test_no_line_is_lost_while_a_child_writes(log: Path) -> None:
    """Given a child that writes line by line, when its log is rotated all the while, then the
    parts in a row have every line, in order."""
    with writing(log, "write-lines", 20_000_000) as child:
        rotations = 0
        while child.poll() is None:
            before = log.stat().st_ino if log.exists() else 0
            logfile.rotate(log, max_bytes=32 * BLOCK, keep=1000)
            rotations += 1
            assert before in (0, log.stat().st_ino), "the live file is never replaced"

    assert rotations > 10
    assert len(parts(log)) > 10
    assert numbers(written(log)) == list(range(200_000))


def test_a_flood_is_bounded_and_its_end_is_kept(log: Path) -> None:
    """Given 100 MB printed at once, when the log is rotated, then the last of it is there and the
    rest takes no room."""
    max_bytes, keep = 1024 * 1024, 3
    with writing(log, "flood", 100_000_000):
        deadline = time.monotonic() + 60
        while last_words(log, 0) != "done":
            assert time.monotonic() < deadline
            logfile.rotate(log, max_bytes=max_bytes, keep=keep)
        logfile.rotate(log, max_bytes=max_bytes, keep=keep)

    assert sum(part.stat().st_size for part in parts(log)) <= (keep + 1) * max_bytes
    kept = numbers(written(log))
    assert kept == list(range(kept[0], 1_000_000))


def test_a_full_disk_leaves_the_live_file_as_it_is(log: Path) -> None:
    text = numbered(0, 1000)
    log.write_bytes(text)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            logfile.rotate(log, max_bytes=8 * BLOCK, keep=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert list(log.parent.iterdir()) == [log]
    assert log.read_bytes() == text

    logfile.rotate(log, max_bytes=8 * BLOCK, keep=3)

    assert written(log) == text


@pytest.mark.usefixtures("no_collapse")
@pytest.mark.parametrize("keep", [1, 2, 3, 20])
def test_without_collapse_the_log_is_copied_and_emptied(keep: int, tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    text = numbered(0, 1000)
    with log.open("ab", buffering=0) as writer:
        writer.write(text)
        logfile.rotate(log, max_bytes=4 * BLOCK, keep=keep)
        writer.write(b"after\n")

    assert log.read_bytes() == b"after\n"
    assert (text + b"after\n").endswith(written(log))
    assert len(parts(log)) == 1 + min(keep, 7)
    assert all(part.stat().st_size <= 4 * BLOCK for part in parts(log))
    if keep == 20:
        assert written(log) == text + b"after\n"


@pytest.mark.usefixtures("no_collapse")
def test_without_collapse_nothing_is_kept_with_keep_0(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(numbered(0, 1000))
    logfile.rotate(log, max_bytes=BLOCK, keep=0)

    assert parts(log) == [log]
    assert log.read_bytes() == b""


# --- tail


def test_tail_goes_on_into_older_parts(log: Path) -> None:
    log.write_bytes(numbered(0, 1000))
    logfile.rotate(log, max_bytes=BLOCK, keep=30)
    lines = numbered(0, 1000).decode().splitlines()

    assert logfile.tail(log, 100) == lines[-100:]
    assert logfile.tail(log, 1) == lines[-1:]
    assert logfile.tail(log, 5000) == lines
    assert logfile.tail(log, 0) == []
    assert logfile.tail(log, 5000, max_bytes=1050) == lines[-10:]


def test_tail_of_no_log(tmp_path: Path) -> None:
    assert logfile.tail(tmp_path / "chat.log", 10) == []


def test_tail_has_the_unfinished_line(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(b"one\ntwo\nthr")

    assert logfile.tail(log, 2) == ["two", "thr"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"\x1b[31mred\x1b[0m alert", "red alert"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1b[2J\x1b[Hgone\x1bc", "gone"),
        (b"a\x00b\x07c\x08d\x7fe\x9bf", "abcde\N{REPLACEMENT CHARACTER}f"),
        (b"tab\tstays", "tab\tstays"),
        (b"10%\r50%\r100%\r", "100%"),
        (b"windows\r", "windows"),
        (b"caf\xc3\xa9 \xff", "café \N{REPLACEMENT CHARACTER}"),
        ("x\u202ey\u0085z".encode(), "xyz"),
        (b"x" * 5000, "x" * (logfile.LINE_MAX_CHARS - 1) + "…"),
    ],
)
def test_lines_cannot_upset_a_terminal(line: bytes, shown: str, tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(b"before\n" + line + b"\nafter\n")

    assert logfile.tail(log, 3) == ["before", shown, "after"]


# --- follow


def test_follow_waits_for_the_file_and_for_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    lines = logfile.follow(log, 0.001)
    first = threading.Timer(0.05, log.write_bytes, (b"one\ntw",))
    first.start()

    assert next(lines) == "one"

    with log.open("ab") as writer:
        writer.write(b"o\nthree\n")

    assert [next(lines), next(lines)] == ["two", "three"]
    first.join()


def test_follow_begins_with_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(b"one\ntwo\nthree\nfo")
    lines = logfile.follow(log, 0.001, lines=2)

    assert [next(lines), next(lines)] == ["two", "three"]

    with log.open("ab") as writer:
        writer.write(b"ur\n")

    assert next(lines) == "four"


def test_follow_notices_that_somebody_emptied_the_file(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(b"one\ntwo\n")
    lines = logfile.follow(log, 0.001, lines=1)
    assert next(lines) == "two"

    log.write_bytes(b"new\n")

    assert next(lines) == "new"


@pytest.mark.parametrize("collapses", [True, False])
def test_follow_does_not_notice_rotation(
    collapses: bool, log: Path, request: pytest.FixtureRequest
) -> None:
    """Given unread lines that rotation moves to other parts, then each is followed once."""
    if not collapses:
        request.getfixturevalue("no_collapse")
    log.write_bytes(numbered(0, 300))
    logfile.rotate(log, max_bytes=2 * BLOCK, keep=100)
    lines = logfile.follow(log, 0.001, lines=1)
    seen = [int(next(lines)[:10])]
    for turn in range(1, 20):
        with log.open("ab") as writer:
            writer.write(numbered(turn * 300, 300))
        seen += [int(next(lines)[:10]) for _ in range(turn * 7)]
        logfile.rotate(log, max_bytes=2 * BLOCK, keep=100)
    seen += [int(next(lines)[:10]) for _ in range(20 * 300 - 1 - seen[-1])]

    assert seen == list(range(299, 20 * 300))


def test_follow_while_a_child_writes_and_its_log_is_rotated(log: Path) -> None:
    count = 50_000
    done = threading.Event()

    def rotate() -> None:
        while not done.wait(0.01):
            logfile.rotate(log, max_bytes=64 * BLOCK, keep=1000)

    rotation = threading.Thread(target=rotate)
    rotation.start()
    try:
        with writing(log, "write-lines", count * LINE_BYTES):
            lines = logfile.follow(log, 0.001, lines=100)
            first = int(next(lines)[:10])
            seen = [first, *(int(line[:10]) for line in itertools.islice(lines, count - first - 1))]
    finally:
        done.set()
        rotation.join()

    assert len(parts(log)) > 5
    assert seen == list(range(first, count))


# --- last words


def test_last_words_are_those_of_this_process(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_bytes(b"error: of the last generation\n")
    offset = logfile.size_bytes(log)

    assert last_words(log, offset) == ""

    with log.open("ab") as writer:
        writer.write(b"loading\n\x1b[31merror: no such model\x1b[0m  \n\n  \n")

    assert last_words(log, offset) == "error: no such model"


def test_last_words_after_a_rotation(log: Path) -> None:
    log.write_bytes(numbered(0, 1000))
    offset = logfile.size_bytes(log)
    logfile.rotate(log, max_bytes=2 * BLOCK, keep=1)
    with log.open("ab") as writer:
        writer.write(b"error: out of memory\n")

    assert last_words(log, offset) == "error: out of memory"


def test_no_log_has_no_words(tmp_path: Path) -> None:
    assert last_words(tmp_path / "chat.log", 0) == ""
    assert logfile.size_bytes(tmp_path / "chat.log") == 0
