"""The file of the ledger, and how a load's log gets into it."""

import json
from pathlib import Path

import pytest

from llmsup.bookkeeping import Books
from llmsup.core.ledger import Key, Ledger
from llmsup.core.options import Options
from llmsup.core.plan import Price
from llmsup.core.sizes import Estimate, Sizes
from llmsup.host import ledger
from llmsup.troubles import Troubles
from tests.unit.test_ledger import ESTIMATE, KEY, MIB, OTHER_MODEL, POOL, record
from tests.unit.test_llama_log import LOAD

FULL = Ledger().learn(KEY, record()).learn(OTHER_MODEL, record(90)).learn(KEY, record(99))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    ledger.save(tmp_path / "ledger.json", FULL)

    assert ledger.load(tmp_path / "ledger.json") == FULL


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert ledger.load(tmp_path / "ledger.json") == Ledger()


@pytest.mark.parametrize("damage", ["cut", "flipped", "version", "empty", "text", "huge"])
def test_one_that_cannot_be_trusted_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.json"
    ledger.save(path, FULL)
    written = path.read_bytes()
    damaged = {
        "cut": written[: len(written.rstrip()) // 2],
        "flipped": written.replace(b"RTX 4050", b"RTX 4051"),
        "version": json.dumps(json.loads(written) | {"version": 99}).encode(),
        "empty": b"",
        "text": b"\xff\xfenot JSON",
        "huge": written + b" " * (5 * MIB),
    }[damage]
    path.write_bytes(damaged)

    assert ledger.load(path) == Ledger()
    assert path.with_suffix(".corrupt").read_bytes() == damaged
    ledger.save(path, FULL)
    assert ledger.load(path) == FULL


def test_a_load_is_entered_from_its_log(tmp_path: Path) -> None:
    """Given the output of an earlier generation before it, only this one's counts."""
    output = tmp_path / "chat.log"
    earlier = "".join(f"{line}\n" for line in LOAD).replace("68.89", "11.11")
    output.write_text(earlier + "".join(f"{line}\n" for line in LOAD))
    books = Books(tmp_path / "ledger.json", Troubles())
    key = Key("a", Options(20), "b1", "RTX 4050")
    buffers_bytes = round(68.89 * MIB) + round(21.83 * MIB) + 8 * MIB + round(17.75 * MIB)

    books.enter(key, Price(ESTIMATE, 0), 300 * MIB, output, len(earlier))

    known = ledger.load(tmp_path / "ledger.json")
    assert known == books.ledger
    (learned,) = known.entries[key]
    assert learned.buffers.weights_bytes == round(68.89 * MIB)
    assert learned.overhead_bytes == 300 * MIB - buffers_bytes
    assert known.price(key, Estimate(Sizes(), Sizes()), POOL).device_bytes == 300 * MIB


@pytest.mark.parametrize("kept", [LOAD[:-3], [], ["nonsense"] * 100])
def test_a_log_that_tells_too_little_teaches_nothing(tmp_path: Path, kept: list[str]) -> None:
    output = tmp_path / "chat.log"
    output.write_text("".join(f"{line}\n" for line in kept))
    books = Books(tmp_path / "ledger.json", Troubles())

    books.enter(KEY, Price(ESTIMATE, 0), 300 * MIB, output, 0)

    assert books.ledger == Ledger()
    assert not (tmp_path / "ledger.json").exists()


def test_a_ledger_that_cannot_be_saved_is_a_trouble_that_ends(tmp_path: Path) -> None:
    output = tmp_path / "chat.log"
    output.write_text("".join(f"{line}\n" for line in LOAD))
    troubles = Troubles()
    books = Books(tmp_path / "state" / "ledger.json", troubles)

    books.enter(KEY, Price(ESTIMATE, 0), 300 * MIB, output, 0)
    assert len(troubles.sentences) == 1
    assert "ledger.json" in troubles.sentences[0]
    assert KEY in books.ledger.entries

    (tmp_path / "state").mkdir()
    troubles.retry()
    assert troubles.sentences == []
    assert ledger.load(tmp_path / "state" / "ledger.json") == books.ledger
