"""Keeps the ledger of the daemon: what each load took is read from the server's log, and kept."""

import logging
import time
from pathlib import Path

from llmsup.core.ledger import Key, Ledger, Record
from llmsup.core.plan import Price
from llmsup.host import ledger, logfile
from llmsup.services import llama_log
from llmsup.troubles import Troubles

log = logging.getLogger(__name__)

LOAD_BYTES = 512 * 1024
"""So much of a generation's output is read: a load's lines take a tenth of that."""


class Books:
    """The ledger, in memory and in its file."""

    def __init__(self, path: Path, troubles: Troubles) -> None:
        self._path = path
        self._troubles = troubles
        self.ledger: Ledger = ledger.load(path)

    def enter(self, key: Key, price: Price, took_bytes: int, output: Path, log_start: int) -> None:
        """A load with this `key` and `price` has settled, and the card lost `took_bytes` to it.

        Its log begins at `log_start` of `output`. Where that tells too little, nothing is learned.
        """
        end = logfile.size_bytes(output)
        found = llama_log.parse(logfile.first_lines(output, log_start, end, LOAD_BYTES))
        is_on_card = bool(found.device.total_bytes) or not key.options.gpu_layers
        if not found.is_complete or not is_on_card:
            log.info("no load of %s on the card is in its log; nothing is learned", output.stem)
            return
        estimated = price.estimate.device
        record = Record(found.device, estimated, took_bytes, time.time(), found.extra_bytes)
        self.ledger = self.ledger.learn(key, record)
        self._save()

    def _save(self) -> None:
        with self._troubles.watched(
            f"what loads take is not being saved to {self._path}", self._save
        ):
            ledger.save(self._path, self.ledger)
