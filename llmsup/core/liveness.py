"""Liveness is progress: a service that has something to do and of which nothing moves is hung.

No single sign is a verdict. A busy server is late with every answer, and an idle one stands still
all day. Hung is what is stopped, silent, or has work pending, *and* of which no sign of life was
seen for as long as its profile allows. Times are monotonic seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from llmsup.config.schema import Liveness
from llmsup.config.units import duration

LOOKS_PER_TIMEOUT = 6
PERIOD_MAX_S = 5.0
GAP_PERIODS = 3.0
"""Looks further apart than this say nothing about the time between them."""

# What a service that does nothing may use up by answering us and taking in new requests: a base,
# and a rate over the time watched. One that works uses many times as much.
IDLE_CPU_S = 0.02
IDLE_CPU_SHARE = 0.02
IDLE_FAULTS = 16
IDLE_FAULTS_PER_S = 2.0


class Voice(Enum):
    """What came of a question to the service."""

    ANSWERED = "answered"
    SILENT = "silent"  # no answer in time
    UNKNOWN = "unknown"  # not asked, not answered by the process itself, or refused


@dataclass(frozen=True)
class Work:
    """What a server says of its requests: how many are not answered, and counters of progress."""

    pending: int
    counters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Vitals:
    """One look at a service.

    `cpu_s` and `faults` (pages read from disk) are those of its process and all descendants.
    `work` is None where the service did not tell. `is_healthy`: what it says when it is asked.
    `is_gpu_busy` is None where nobody knows. `is_waiting`: it may be somebody else who is late.
    """

    cpu_s: float = 0.0
    faults: int = 0
    is_stopped: bool = False
    is_traced: bool = False
    is_gpu_busy: bool | None = None
    voice: Voice = Voice.UNKNOWN
    work: Work | None = None
    is_healthy: bool = False
    is_waiting: bool = False


@dataclass(frozen=True)
class Pulse:
    """Since when nothing has moved, and what the counters were then.

    `at` is the last look. `reason` is the verdict, a sentence; empty while there is none.
    """

    since: float
    at: float
    cpu_s: float = 0.0
    faults: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_suspect(self) -> bool:
        """Whether it should have moved by the last look, and had not."""
        return self.since < self.at


def period_s(policy: Liveness) -> float:
    """How long to wait between two looks."""
    return min(PERIOD_MAX_S, policy.timeout_s / LOOKS_PER_TIMEOUT)


def patience_s(policy: Liveness) -> float:
    """How long nothing may move.

    Up to a period passes before a standstill is noticed, another one until the look that is the
    verdict has been taken, and the rest is for the kill and the spawn.
    """
    return policy.timeout_s - 2.5 * period_s(policy)


def is_still(pulse: Pulse | None, vitals: Vitals, now: float, policy: Liveness) -> bool:
    """Whether no sign of life was seen since `pulse.since`, answers apart."""
    if pulse is None or vitals.is_traced or now - pulse.at > GAP_PERIODS * period_s(policy):
        return False
    watched_s = now - pulse.since
    cpu_s = vitals.cpu_s - pulse.cpu_s
    faults = vitals.faults - pulse.faults
    # Less than before: a process of the tree has ended.
    if not 0 <= cpu_s <= IDLE_CPU_S + IDLE_CPU_SHARE * watched_s:
        return False
    if not 0 <= faults <= IDLE_FAULTS + IDLE_FAULTS_PER_S * watched_s:
        return False
    return vitals.is_stopped or not vitals.is_gpu_busy


def observe(pulse: Pulse | None, vitals: Vitals, now: float, policy: Liveness) -> Pulse:
    """The pulse after one more look. Whatever moved, or has nothing to do, starts it anew."""
    counters = vitals.work.counters if vitals.work else {}
    if (
        pulse is None
        or not is_still(pulse, vitals, now, policy)
        or not _is_expected_to_move(vitals)
        or any(counters.get(name, count) != count for name, count in pulse.counters.items())
    ):
        return Pulse(now, now, vitals.cpu_s, vitals.faults, counters)
    still_s = now - pulse.since
    is_hung = policy.timeout_s > 0 and patience_s(policy) <= still_s
    return replace(
        pulse,
        at=now,
        counters={**counters, **pulse.counters},
        reason=_verdict(vitals, still_s) if is_hung else "",
    )


def _is_expected_to_move(vitals: Vitals) -> bool:
    has_work = vitals.work is not None and vitals.work.pending > 0
    is_mute = vitals.voice is Voice.SILENT and not vitals.is_waiting
    return vitals.is_stopped or is_mute or has_work


def _verdict(vitals: Vitals, still_s: float) -> str:
    for_so_long = f"for {duration(round(still_s, 1))}"
    if vitals.is_stopped:
        return f"stopped by a signal, has not moved {for_so_long}"
    claim = "says it is healthy but " if vitals.is_healthy else ""
    if vitals.work is not None:
        pending = vitals.work.pending
        requests = "1 request" if pending == 1 else f"{pending} requests"
        return f"{claim}decoded nothing {for_so_long} with {requests} pending"
    said = "did not tell what it does" if claim else "answered nothing"
    return f"{claim}{said} {for_so_long} and used no CPU time"
