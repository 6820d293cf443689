"""The ledger in its file. The daemon writes it; others may read it at any time."""

import logging
from pathlib import Path

from llmsup.core.ledger import Ledger
from llmsup.host.sealed import Sealed

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 8 * 1024 * 1024

_FILE = Sealed("ledger", Ledger, VERSION, MAX_BYTES)


def save(path: Path, ledger: Ledger) -> None:
    """Replace the file. Raises OSError."""
    _FILE.save(path, ledger)


def load(path: Path) -> Ledger:
    """What was saved; an empty one where there is none or it cannot be trusted (set aside)."""
    return _FILE.load(path) or Ledger()


def peek(path: Path) -> Ledger:
    """The same for who does not own it: an unreadable one counts as empty and stays in place."""
    try:
        return _FILE.read(path) or Ledger()
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s)", path, error)
        return Ledger()
