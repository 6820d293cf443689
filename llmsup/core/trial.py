"""A profile on trial: whether its services serve by now, and the words for the end of a switch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from llmsup.core.service import Service, State, Want
from llmsup.core.switching import Event, is_blocked, observe

_SERVING = frozenset({State.READY, State.UNREADY})


class Phase(Enum):
    """Where a switch to another profile is."""

    CHECKING = "checking"  # nothing has been changed yet
    LOADING = "loading"  # a daemon with the new profile brings it about
    VERIFYING = "verifying"  # all models are loaded, and not all have proved themselves
    RESTORING = "restoring"  # a daemon with the old profile brings that about again
    SWITCHED = "switched"
    REFUSED = "refused"  # nothing was changed
    RESTORED = "restored"
    LOST = "lost"  # what ran before does not come back at once; its keepers go on trying
    STUCK = "stuck"  # the old profile cannot be read any more: the new one stays as it is


@dataclass(frozen=True)
class Pending:
    """It cannot be said yet."""


@dataclass(frozen=True)
class Passed:
    """All serve."""


@dataclass(frozen=True)
class Failed:
    """One does not, for this reason."""

    reason: str


Verdict = Pending | Passed | Failed


def judge(
    services: Iterable[Service],
    last: Mapping[str, int],
    faults: Mapping[str, str | None],
    *,
    is_rolling: bool,
) -> Verdict:
    """Whether services serve as the profile has them.

    `last`: the last generation under the other profile, of those that are started or replaced;
    `is_rolling`: whether some have yet to be. `faults`: of their models, what a look at the server
    found, empty for nothing, None for none yet. A model fails with its first death. The others have
    a restart policy for that, and so has what was not touched. Who is not wanted is not waited for,
    and who depends on one that is not waited for fails.
    """
    wanted = [each for each in services if each.want is Want.UP]
    coming = frozenset(each.name for each in wanted)
    for each in wanted:
        if is_blocked(each) and coming.intersection(each.missing):
            continue
        if reason := _failure(each, last, faults):
            return Failed(f"{each.name}: {reason}")
    for each in wanted:
        if not is_rolling and each.state in _SERVING and not _is_renewed(each, last):
            return Failed(f"{each.name} was not replaced")
    is_serving = all(
        each.state in _SERVING and _is_renewed(each, last) and faults.get(each.name, "") == ""
        for each in wanted
    )
    return Passed() if is_serving else Pending()


def _failure(
    service: Service, last: Mapping[str, int], faults: Mapping[str, str | None]
) -> str | None:
    why = service.why or f"it is {service.state.value}"
    if is_blocked(service):
        return why
    if service.name not in faults:
        return why if service.state is State.FAILED else None
    if observe(service, last[service.name]) is not Event.FAILED:
        return faults[service.name]
    death = service.death
    is_its = death is not None and death.generation > last[service.name]
    return death.reason if death and is_its else why


def _is_renewed(service: Service, last: Mapping[str, int]) -> bool:
    return service.generation > last.get(service.name, -1)


@dataclass(frozen=True)
class Story:
    """What is told of a switch between two profiles. `why_lost`: why the old one is not back."""

    old: str
    new: str
    reason: str = ""
    why_lost: str = ""
    was_serving: bool = False


def message(phase: Phase, story: Story) -> str:
    """The end of a switch in words: what failed, and what serves now."""
    old, new = story.old, story.new
    if phase is Phase.SWITCHED:
        return f"{new} serves {'already' if story.was_serving else 'now'}"
    ends = {
        Phase.REFUSED: f"nothing was changed, {old} serves as before",
        Phase.RESTORED: f"{old} serves again",
        Phase.LOST: f"{old} does not come back at once ({story.why_lost})",
        Phase.STUCK: f"{old} cannot be brought back ({story.why_lost}), {new} stays as it is",
    }
    return f"{old} was not switched to {new}: {story.reason}; {ends[phase]}"
