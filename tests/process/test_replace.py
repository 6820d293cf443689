"""Files that are replaced: whole, private, and also on a full disk."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmsup.host import logfile, replace
from llmsup.host.replace import BLOCK_BYTES, fingerprint, replace_file
from tests.disk import SmallDisk, small_disk


@pytest.fixture(params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    with small_disk(request.param, size_mib=8) as mounted:
        yield mounted


def test_the_old_file_becomes_the_spare(tmp_path: Path) -> None:
    path, spare = tmp_path / "list", tmp_path / "spare"
    inodes, seen = set(), set()
    for number in range(10):
        replace_file(path, spare, b"%d" % number)
        assert path.read_bytes().strip() == b"%d" % number
        inodes.add(path.stat().st_ino)
        seen.add(fingerprint(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(inodes) == 2
    assert len(seen) == 10


def test_a_replacement_needs_no_room(disk: SmallDisk) -> None:
    """Given a full disk, lists grow to what they once were, shrink, and grow again."""
    path, spare = disk.path / "list", disk.path / "spare"
    large = b"x" * (3 * BLOCK_BYTES - 5)
    replace_file(path, spare, large)
    replace_file(path, spare, b"small")
    disk.fill()
    for content in (b"1", large, b"2", large, large, b"3"):
        replace_file(path, spare, content)
        assert path.read_bytes().rstrip(b" ") == content
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, spare, b"y" * 40 * BLOCK_BYTES)
    assert path.read_bytes().strip() == b"3", "what does not fit leaves the old one"
    disk.free()
    replace_file(path, spare, b"y" * 40 * BLOCK_BYTES)
    assert path.read_bytes().strip() == b"y" * 40 * BLOCK_BYTES


def test_a_reader_never_sees_a_mixture(tmp_path: Path) -> None:
    path, spare = tmp_path / "list", tmp_path / "spare"
    replace_file(path, spare, b"a" * 20_000)
    mixed: list[bytes] = []
    ends = threading.Event()

    def read() -> None:
        while not ends.is_set():
            # The file that is open may become the spare, so a reader looks whether it still is.
            with path.open("rb") as file:
                content = file.read().strip()
                is_live = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            if is_live and len(set(content)) != 1:
                mixed.append(content)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(500):
        replace_file(path, spare, (b"a", b"b")[number % 2] * 20_000)
    ends.set()
    reader.join(20)
    assert mixed == []


def test_where_files_cannot_be_exchanged_they_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace, "_RENAME_EXCHANGE", 1 << 10)  # EINVAL, as from such a system
    path, spare = tmp_path / "list", tmp_path / "spare"
    for content in (b"one", b"two", b"three"):
        replace_file(path, spare, content)
        assert path.read_bytes().strip() == content


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_stands_in_place_of_the_spare_goes(tmp_path: Path, kind: str) -> None:
    path, spare, precious = tmp_path / "list", tmp_path / "spare", tmp_path / "precious"
    precious.write_text("precious")
    if kind == "link":
        spare.symlink_to(precious)
    else:
        os.mkfifo(spare)
    replace_file(path, spare, b"one")
    replace_file(path, spare, b"two")
    assert path.read_bytes().strip() == b"two"
    assert precious.read_text() == "precious"


def test_a_log_is_rotated_on_a_full_disk(disk: SmallDisk) -> None:
    """The oldest part makes room for the newest, and the live file stays below its limit."""
    log = disk.path / "log"
    line = b"%07d" + b"." * 56 + b"\n"
    numbers = iter(range(1_000_000))

    def write(size: int) -> None:
        with log.open("ab") as file:
            for _ in range(size // 64):
                file.write(line % next(numbers))

    max_bytes = 256 * 1024
    for _ in range(4):
        write(max_bytes + 64 * 1024)
        logfile.rotate(log, max_bytes=max_bytes, keep=2)
    write(max_bytes)
    disk.fill()
    logfile.rotate(log, max_bytes=max_bytes, keep=2)
    assert log.stat().st_size <= max_bytes
    parts = [log.with_name("log.2"), log.with_name("log.1"), log]
    rest = b"".join(part.read_bytes() for part in parts)
    found = [int(each[:7]) for each in rest.splitlines()[1:]]
    assert found == list(range(found[0], next(numbers))), "in a row, up to the last line"


def test_a_smaller_number_of_parts_is_obeyed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for keep, parts in ((5, 5), (2, 2)):
        for _ in range(6):
            with log.open("ab") as file:
                file.write(b"line\n" * 4000)
            logfile.rotate(log, max_bytes=8192, keep=keep)
        assert len(list(tmp_path.glob("log.*"))) == parts
