"""What follows when a service ran out of the card's memory: a smaller plan, for it alone. Pure.

At most three steps lead from any plan to one that needs nothing of the card, so running out is no
crash loop. What was found out is forgotten once the card has clearly more room than it had then.
"""

from dataclasses import dataclass, replace

SHORT_MIN_BYTES = 64 * 2**20
FURTHER = 0.75


@dataclass(frozen=True, slots=True)
class Shrunk:
    """It ran out with more than `at_most_bytes` when `free_bytes` were free (None: not known).

    `steps`: how often in a row.
    """

    at_most_bytes: int
    free_bytes: int | None
    short_bytes: int
    steps: int

    def still_holds(self, free_bytes: int | None) -> bool:
        """Whether there is not clearly more room now."""
        if self.free_bytes is None or free_bytes is None:
            return True
        return free_bytes < self.free_bytes + self.short_bytes + SHORT_MIN_BYTES


def shrink(
    before: Shrunk | None, planned_bytes: int, free_bytes: int | None, short_bytes: int | None
) -> Shrunk:
    """After one more time: less by what was missing, then by a quarter, then nothing at all.

    `short_bytes` is None where the process did not tell.
    """
    missing_bytes = max(short_bytes or 0, SHORT_MIN_BYTES)
    steps = 1 if before is None else before.steps + 1
    if steps == 1:
        at_most_bytes = planned_bytes - missing_bytes
    elif steps == 2:
        at_most_bytes = int(planned_bytes * FURTHER)
    else:
        at_most_bytes = 0
    return Shrunk(max(0, at_most_bytes), free_bytes, missing_bytes, steps)


def loaded(before: Shrunk) -> Shrunk:
    """It has loaded within these bounds: what comes later is no longer in a row with it."""
    return replace(before, steps=0)
