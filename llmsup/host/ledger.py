"""The file of the ledger: the daemon writes it, `llmsup plan` reads it, too."""

from pathlib import Path

import msgspec

from llmsup.core.ledger import Key, Ledger, Record
from llmsup.host import sealed

VERSION = 1


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Key
    records: tuple[Record, ...]


def save(path: Path, ledger: Ledger) -> None:
    """Replace the file. Raises OSError."""
    entries = [_Entry(key, records) for key, records in ledger.entries.items()]
    sealed.save(path, VERSION, msgspec.json.encode(entries), key="entries")


def load(path: Path) -> Ledger:
    """What was saved; an empty ledger where that cannot be trusted."""
    entries = sealed.load(path, VERSION, tuple[_Entry, ...], key="entries") or ()
    return Ledger({each.key: each.records for each in entries})
