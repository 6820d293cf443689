"""Whether the card was lost, and when the services that use it need new processes. Pure.

After a suspend, a pause of the virtual machine or a crash of its driver the card may be gone for a
while. What had memory on it never recovers, so those services are restarted, once for each loss and
only when the card answers again. A laptop sleeps every day: that alone restarts nothing.
"""

from dataclasses import dataclass, replace
from enum import Enum

from llmsup.core.device import Absence, Device, NoDevice, Reading

SLEPT_S = 1.0
WALL_JUMP_S = 5.0
SUSPECT_S = 60.0
ERRORS_LAST_S = 4.0
RENEW_GAP_S = 60.0

_SAYS_NOTHING = frozenset({Absence.SILENT, Absence.UNBELIEVABLE})
_MAY_PASS = frozenset({Absence.ERROR})


@dataclass(frozen=True)
class Clocks:
    """Three clocks read at one moment, in seconds. Only `monotonic_s` stands still in a suspend."""

    monotonic_s: float
    boottime_s: float
    wall_s: float

    def jump_s(self, later: "Clocks") -> float:
        """How long the machine was away in between; 0 where it was not.

        A suspend shows as boot time, a pause of a virtual machine in the wall clock only. So does
        a clock that was set: nothing may follow from a jump alone.
        """
        awake_s = later.monotonic_s - self.monotonic_s
        slept_s = later.boottime_s - self.boottime_s - awake_s
        wall_s = later.wall_s - self.wall_s - awake_s
        if slept_s > SLEPT_S:
            return slept_s
        return wall_s if wall_s > WALL_JUMP_S else 0.0


class Condition(Enum):
    """What is known of the card."""

    UNSEEN = "unseen"  # no reading has found it: nothing is watched
    PRESENT = "present"
    LOST = "lost"  # it was there; services that use it need new processes


@dataclass(frozen=True)
class Card:
    """The card over time. Only `step` makes a changed one. Times are monotonic seconds.

    `errors_since`: the first of the errors in a row that may pass. `suspect_until`: up to when an
    error is taken for a loss at once, the machine having been away.
    """

    condition: Condition = Condition.UNSEEN
    clocks: Clocks | None = None
    errors_since: float | None = None
    suspect_until: float | None = None
    lost_at: float | None = None
    renewed_at: float | None = None
    why: str = ""


@dataclass(frozen=True)
class NoteJump:
    """Say that the machine was away."""

    away_s: float


@dataclass(frozen=True)
class NoteLoss:
    """Say that the card was lost."""

    why: str


@dataclass(frozen=True)
class Renew:
    """Give the services that use the card new processes: it was away so long, and is back."""

    why: str
    away_s: float


Action = NoteJump | NoteLoss | Renew


def step(card: Card, reading: Reading, clocks: Clocks) -> tuple[Card, tuple[Action, ...]]:
    """The card after one more reading, and what is to be done about it."""
    now = clocks.monotonic_s
    away_s = 0.0 if card.clocks is None else card.clocks.jump_s(clocks)
    after = replace(card, clocks=clocks)
    jumped: tuple[Action, ...] = ()
    if away_s and card.condition is not Condition.UNSEEN:
        after = replace(after, suspect_until=now + SUSPECT_S)
        jumped = (NoteJump(away_s),)
    after, actions = (
        _found(after, now) if isinstance(reading, Device) else _missed(after, reading, now)
    )
    return after, jumped + actions


def _found(card: Card, now: float) -> tuple[Card, tuple[Action, ...]]:
    present = replace(card, condition=Condition.PRESENT, errors_since=None, lost_at=None, why="")
    if card.condition is not Condition.LOST:
        return present, ()
    if card.renewed_at is not None and now - card.renewed_at < RENEW_GAP_S:
        return card, ()  # it comes and goes: no restart for each time
    away_s = now - (now if card.lost_at is None else card.lost_at)
    return replace(present, renewed_at=now), (Renew(card.why, away_s),)


def _missed(card: Card, reading: NoDevice, now: float) -> tuple[Card, tuple[Action, ...]]:
    if card.condition is not Condition.PRESENT or reading.absence in _SAYS_NOTHING:
        return card, ()
    since = now if card.errors_since is None else card.errors_since
    is_suspect = card.suspect_until is not None and now <= card.suspect_until
    may_pass = reading.absence in _MAY_PASS and not is_suspect
    if may_pass and now - since < ERRORS_LAST_S:
        return replace(card, errors_since=since), ()
    lost = replace(
        card, condition=Condition.LOST, errors_since=None, lost_at=now, why=reading.reason
    )
    return lost, (NoteLoss(reading.reason),)
