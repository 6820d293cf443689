"""What one scenario did and found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from llmsup.drill.judgement import Finding, Span
from llmsup.drill.traffic import Record


class Outcome(Enum):
    """How a scenario ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Broken:
    """What was broken and when, what was sent around it, and what is to be said of it."""

    did: str
    away: Span
    records: Sequence[Record]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Report:
    """One scenario for the evidence. Times are Unix seconds; the span in `broken` is monotonic."""

    scenario: str
    outcome: Outcome
    line: str
    began_time: float
    ended_time: float
    by_hand: Sequence[str] = ()
    broken: Broken | None = None
    status_before: object = None
    status_after: object = None
    events: Sequence[object] = field(default_factory=list)


def judged(findings: Sequence[Finding]) -> tuple[Outcome, str]:
    """The outcome and the line of a scenario with these findings."""
    passed = bool(findings) and all(finding.holds for finding in findings)
    line = " · ".join(str(finding) for finding in findings)
    return (Outcome.PASSED if passed else Outcome.FAILED), line
