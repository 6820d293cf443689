"""Writes down what becomes of the card and its plans, in the journal and the daemon's log."""

import logging
from collections.abc import Sequence

from llmsup.config.units import duration
from llmsup.core import card
from llmsup.core.leases import Lease
from llmsup.host.journal import Journal
from llmsup.placing import Placed

log = logging.getLogger(__name__)

MIB = 2**20


class CardNews:
    """News of one card; `journal` is that of `llmsup events`."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def note_placed(self, placed: Placed) -> None:
        """A plan was made for a service."""
        given, free_bytes = placed.placement, placed.free_bytes
        log.info("service=%s plan: %s", given.service, placed.why)
        self._journal.write(
            "plan",
            service=given.service,
            generation=placed.generation,
            gpu_layers=given.options.gpu_layers,
            planned_mib=given.price.device_bytes // MIB,
            free_mib=None if free_bytes is None else free_bytes // MIB,
            why=placed.why,
        )

    def note_measured(self, lease: Lease) -> None:
        """What a load took is known."""
        measured_mib = (lease.measured_bytes or 0) // MIB
        planned_mib = lease.planned_bytes // MIB
        self._journal.write(
            "measured",
            service=lease.service,
            generation=lease.generation,
            planned_mib=planned_mib,
            measured_mib=measured_mib,
            why=f"took {measured_mib} MiB, {planned_mib} were planned",
        )

    def note_no_card(self, reason: str) -> None:
        """Models are placed without a card."""
        log.info("models run on the CPU: %s", reason)
        self._journal.write("card", why=f"none, models run on the CPU: {reason}")

    def note_found(self, users: Sequence[str]) -> None:
        """There is a card now, and these services that were started without one are restarted."""
        words = f"there now; restarting {', '.join(users)}"
        log.warning("the card is %s", words)
        self._journal.write("card", why=words)

    def note_action(self, action: card.Action, users: Sequence[str]) -> None:
        """The card was lost, or is back, and these services `users` of it are restarted."""
        match action:
            case card.NoteJump(away_s):
                log.info("the machine was away for %s", duration(away_s))
            case card.NoteLoss(why):
                log.error("the card was lost: %s", why)
                self._journal.write("card", why=f"lost: {why}")
            case card.Renew(why, away_s):
                restarted = ", ".join(users) or "nothing"
                words = f"back after {duration(away_s)}; restarting {restarted}"
                log.warning("the card is %s: %s", words, why)
                self._journal.write("card", why=words)
