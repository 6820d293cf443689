"""Writes down what becomes of the services, in the journal and the daemon's log."""

import logging
from collections.abc import Callable

from llmsup.core.leases import Lease
from llmsup.core.service import Service
from llmsup.evidence import Evidence
from llmsup.host.journal import Journal
from llmsup.inquest import Findings
from llmsup.placing import Placed
from llmsup.snapshot import plan_info

log = logging.getLogger(__name__)


class Chronicle:
    """The changes and deaths of services. `past`: what a generation had of the card."""

    def __init__(
        self,
        journal: Journal,
        evidence: Evidence,
        *,
        past: Callable[[str, int], tuple[Placed, Lease | None] | None],
    ) -> None:
        self._journal = journal
        self._evidence = evidence
        self._past = past

    def note_change(self, before: Service, after: Service) -> None:
        """A service is in another state, or another generation."""
        log.info(
            "service=%s generation=%d state=%s before=%s want=%s why=%s",
            after.name,
            after.generation,
            after.state.value,
            before.state.value,
            after.want.value,
            after.why or "-",
        )
        self._journal.write(
            "state",
            service=after.name,
            generation=after.generation,
            state=after.state.value,
            before=before.state.value,
            want=after.want.value,
            why=after.why,
        )

    def note_death(self, findings: Findings) -> None:
        """A process died."""
        death = findings.death
        self._journal.write(
            "death",
            service=findings.unit.name,
            generation=death.generation,
            cause=death.cause.value,
            lived_s=findings.lived_s,
            next=findings.next_step,
            why=death.reason,
        )
        past = self._past(findings.unit.name, death.generation)
        self._evidence.keep(findings, plan_info(*past) if past else None)
