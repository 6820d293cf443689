"""The ledger in its file, and a load measured from a log."""

import errno
import logging
from pathlib import Path

import pytest

from llmsup.bookkeeping import Books
from llmsup.core.ledger import Ledger
from llmsup.core.plan import Price
from llmsup.host import ledger as ledger_file
from llmsup.troubles import Troubles
from tests.unit.test_ledger import ESTIMATE, KEY, MIB, OTHER, load
from tests.unit.test_llama_log import CUDA

KNOWN = Ledger().learn(KEY, load()).learn(OTHER, load(150, time=5.0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


def test_it_comes_back_as_it_was(path: Path) -> None:
    assert ledger_file.load(path) == Ledger()
    ledger_file.save(path, KNOWN)
    ledger_file.save(path, KNOWN)
    assert ledger_file.load(path) == ledger_file.peek(path) == KNOWN


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content.rstrip()) // 3],
        lambda content: content.replace(b'"time":5.0', b'"time":6.0'),
        lambda content: content.replace(b'"version":1', b'"version":99'),
        lambda _: b"",
        lambda _: b"[]",
        lambda _: b"\xff" * 100,
        lambda _: b'{"version":1}',
        lambda _: b"[" * 100_000,
    ],
    ids=["cut", "changed", "newer", "empty", "list", "binary", "bare", "deep"],
)
def test_a_corrupt_one_is_set_aside_and_said(
    path: Path, spoil: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(spoil)
    ledger_file.save(path, KNOWN)
    corrupt = spoil(path.read_bytes())
    path.write_bytes(corrupt)
    with caplog.at_level(logging.WARNING):
        assert ledger_file.peek(path) == Ledger()
        assert path.read_bytes() == corrupt, "a reader leaves it where it is"
        assert ledger_file.load(path) == Ledger()
    assert path.with_suffix(".corrupt").read_bytes() == corrupt
    assert "kept as" in caplog.text
    ledger_file.save(path, KNOWN)
    assert ledger_file.load(path) == KNOWN


def test_what_cannot_be_saved_leaves_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger_file.save(path, KNOWN)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmsup.host.replace.os.write", full)
    with pytest.raises(OSError, match="No space"):
        ledger_file.save(path, Ledger())
    assert ledger_file.load(path) == KNOWN


def lines(log: Path, text: str) -> int:
    """Append to the log; where that begins."""
    start = log.stat().st_size if log.exists() else 0
    with log.open("a") as file:
        file.write(text)
    return start


def test_a_load_is_entered_from_its_part_of_the_log(tmp_path: Path, path: Path) -> None:
    log = tmp_path / "chat.log"
    lines(log, CUDA.replace("1834.83", "99.00"))
    start = lines(log, CUDA)
    books = Books(path, Troubles())

    books.enter(KEY, Price(ESTIMATE, 0), 2083 * MIB, log, start)

    assert ledger_file.load(path) == books.ledger
    (history,) = books.ledger.histories
    (record,) = history.records
    assert history.key == KEY
    assert record.buffers.weights_bytes == round(1834.83 * MIB)
    assert record.residual_bytes == 2083 * MIB - record.buffers.total_bytes
    assert books.ledger.price(KEY, ESTIMATE, 0).device_bytes == 2083 * MIB


@pytest.mark.parametrize("text", [CUDA[:1000], "", "nonsense\n" * 100, None])
def test_a_log_that_does_not_tell_teaches_nothing(
    tmp_path: Path, path: Path, text: str | None
) -> None:
    log = tmp_path / "chat.log"
    if text is not None:
        lines(log, text)
    books = Books(path, Troubles())

    books.enter(KEY, Price(ESTIMATE, 0), 2083 * MIB, log, 0)

    assert books.ledger == Ledger()
    assert not path.exists()


def test_one_that_cannot_be_saved_is_a_trouble_that_ends(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    lines(log, CUDA)
    troubles = Troubles()
    path = tmp_path / "state" / "ledger.json"
    books = Books(path, troubles)

    books.enter(KEY, Price(ESTIMATE, 0), 2083 * MIB, log, 0)
    assert len(troubles.sentences) == 1
    assert "ledger.json" in troubles.sentences[0]
    assert len(books.ledger.histories) == 1

    path.parent.mkdir()
    troubles.retry()
    assert troubles.sentences == []
    assert ledger_file.load(path) == books.ledger


def test_a_load_that_took_nothing_of_the_card_teaches_nothing(tmp_path: Path, path: Path) -> None:
    """Given layers for the card and a server that saw none (its own CUDA_VISIBLE_DEVICES)."""
    log = tmp_path / "chat.log"
    start = lines(log, CUDA.replace("CUDA0", "CPU"))
    books = Books(path, Troubles())
    books.enter(KEY, Price(ESTIMATE, 0), 0, log, start)
    assert books.ledger == Ledger()
