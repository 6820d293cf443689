"""What was seen, held against what must hold. Pure: records and bounds in, findings out.

A scenario's findings are the words of its line; it passed where all of them hold.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from llmsup.drill.traffic import Record


class Allowed(Enum):
    """Which requests of a scenario may fail."""

    NONE = "none: another service of the route answers"
    HONEST = "503 with Retry-After, and only while the route's one service is away"
    AWAY = "refused or reset, and only until the gateway serves again"


@dataclass(frozen=True)
class Span:
    """From the break to the recovery, in monotonic seconds. `end` is None where there was none."""

    start: float
    end: float | None

    @property
    def length_s(self) -> float | None:
        """How long it was away."""
        return None if self.end is None else self.end - self.start


@dataclass(frozen=True)
class Finding:
    """A part of the line. `bound` is what must hold, empty for what is only told."""

    words: str
    bound: str = ""
    holds: bool = True

    def __str__(self) -> str:
        return self.words if self.holds else f"{self.words} (must be: {self.bound})"


def in_ms_or_s(seconds: float) -> str:
    """For people: "21 ms", "0.42 s"."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def failures(records: Sequence[Record], allowed: Allowed, away: Span) -> Finding:
    """How many requests failed, and whether each of them was allowed to."""
    failed = [record for record in records if record.failed]
    holds = bool(records) and all(_is_allowed(record, allowed, away) for record in failed)
    words = f"{len(failed)} of {len(records)} requests failed"
    if failed and allowed is Allowed.HONEST and holds:
        words += ", all with an honest 503"
    if failed and allowed is Allowed.AWAY:
        words += f" ({_kinds(failed)})"
    return Finding(words, allowed.value, holds)


def _is_allowed(record: Record, allowed: Allowed, away: Span) -> bool:
    end = away.end if away.end is not None else float("inf")
    if record.answered_at < away.start or record.sent_at > end:
        return False
    match allowed:
        case Allowed.NONE:
            return False
        case Allowed.HONEST:
            return record.status == 503 and bool(record.retry_after)
        case Allowed.AWAY:
            return record.status == 0


def _kinds(failed: Sequence[Record]) -> str:
    """What became of them: "2 reset, 40 refused"."""
    counts = Counter(_kind(record) for record in failed)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _kind(record: Record) -> str:
    if record.status:
        return f"answered {record.status}"
    return "refused" if record.error.startswith("ConnectionRefused") else "reset"


def in_flight(records: Sequence[Record], away: Span) -> Finding:
    """Requests that were not answered at the break."""
    return Finding(f"{len(overlapping(records, Span(away.start, away.start)))} in flight")


def meanwhile(records: Sequence[Record], away: Span, victim: str) -> list[Finding]:
    """Who answered for the victim while it was away, and the longest wait of that time."""
    during = [r for r in overlapping(records, away) if not r.failed]
    if not during:
        return []
    who = Counter(record.service for record in during if record.service not in {victim, ""})
    names = ", ".join(name for name, _ in who.most_common())
    worst_s = max(record.wait_s for record in during)
    said = [Finding(f"answered meanwhile by {names}")] if names else []
    return [*said, Finding(f"worst wait {in_ms_or_s(worst_s)}")]


def overlapping(records: Sequence[Record], span: Span) -> list[Record]:
    """The records that were in flight at some time of the span."""
    end = span.end if span.end is not None else float("inf")
    return [r for r in records if r.sent_at <= end and r.answered_at >= span.start]


def recovered(what: str, away: Span, within_s: float) -> Finding:
    """Whether it was back within its bound: `what` is "chat ready again"."""
    bound = f"within {in_ms_or_s(within_s)}"
    if away.length_s is None:
        return Finding(f"not {what}", bound, holds=False)
    words = f"{what} after {in_ms_or_s(away.length_s)}"
    return Finding(words, bound, away.length_s <= within_s)


def all_answered(records: Sequence[Record], expected: int) -> list[Finding]:
    """Whether every one of a burst was answered; its usual and its longest wait."""
    waits = [record.wait_s for record in records if not record.failed]
    answered = Finding(
        f"{len(waits)} of {expected} answered", f"{expected}", len(waits) == expected
    )
    if not waits:
        return [answered]
    median = Finding(f"p50 {in_ms_or_s(statistics.median(waits))}")
    return [answered, median, Finding(f"longest {in_ms_or_s(max(waits))}")]


def of_note(records: Sequence[Record], away: Span, *, most: int = 40) -> list[Record]:
    """What a person would look at: failed, in flight at the break, or slow; in order of sending."""
    failed = [record for record in records if record.failed]
    cut = overlapping(records, Span(away.start, away.start))
    slow = sorted(records, key=lambda record: -record.wait_s)[:5]
    chosen = {id(record): record for record in [*cut, *slow, *failed]}
    return sorted(list(chosen.values())[:most], key=lambda record: record.sent_at)
