"""Probe results to readiness, with thresholds. Readiness gates routing and nothing else."""

from dataclasses import dataclass, replace
from enum import Enum

from llmsup.config.schema import Readiness


class Outcome(Enum):
    """What one probe found."""

    PASSED = "passed"
    LOADING = "loading"  # it answers, and says that its model is not loaded yet
    UNWELL = "unwell"  # it answers, and neither well nor that it is loading
    SILENT = "silent"  # no answer in time
    FAILED = "failed"  # nobody there, or no proper answer
    UNKNOWN = "unknown"  # the probe could not be made: says nothing about the service


@dataclass(frozen=True)
class ProbeResult:
    """One probe: its outcome and, unless it passed, a phrase that says what was seen."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Health:
    """Consecutive probe results of one generation, and whether they add up to ready."""

    is_ready: bool = False
    passes: int = 0
    failures: int = 0


def observe(health: Health, result: ProbeResult, policy: Readiness) -> Health:
    """Health after one more result. `is_ready` flips only when a threshold is reached."""
    if result.outcome is Outcome.UNKNOWN:
        return health
    if result.outcome is Outcome.PASSED:
        passes = health.passes + 1
        ready = health.is_ready or passes >= policy.success_threshold
        return replace(health, is_ready=ready, passes=passes, failures=0)
    failures = health.failures + 1
    ready = health.is_ready and failures < policy.failure_threshold
    return replace(health, is_ready=ready, passes=0, failures=failures)


def until_next_s(now: float, period_s: float) -> float:
    """Seconds to the next probe: to a multiple of the period, half a period from now or later.

    Services with one period are so probed at the same moments, and wake the daemon up once.
    """
    return period_s * 1.5 - (now + period_s / 2) % period_s
