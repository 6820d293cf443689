"""Switching a service to another model: the phases, what leads from one to the next, and the words.

Every way through ends with the target serving, or with what ran before serving again or still; but
for an operator who stops the service meanwhile, and who has the last word.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from llmsup.core.diagnosis import Cause
from llmsup.core.service import Service, State, Want


class Phase(Enum):
    """Where a switch is."""

    CHECKING = "checking"  # nothing has been changed yet
    LEAVING = "leaving"  # what ran before finishes its requests and ends
    LOADING = "loading"  # the target has a process
    VERIFYING = "verifying"  # it is ready, and asked what it serves; it gets no requests yet
    LOADING_BESIDE = "loading beside"  # likewise, and what ran before goes on serving
    VERIFYING_BESIDE = "verifying beside"
    RESTORING = "restoring"  # what ran before is started again
    SWITCHED = "switched"
    REFUSED = "refused"  # nothing was changed
    KEPT = "kept"  # what ran before has been serving all the time
    RESTORED = "restored"
    LOST = "lost"  # what ran before does not come back at once; its keeper goes on trying
    ABANDONED = "abandoned"  # an operator stopped it


ENDS = frozenset(
    {Phase.SWITCHED, Phase.REFUSED, Phase.KEPT, Phase.RESTORED, Phase.LOST, Phase.ABANDONED}
)
BESIDE = frozenset({Phase.LOADING_BESIDE, Phase.VERIFYING_BESIDE})


class Event(Enum):
    """What happens to a switch."""

    ACCEPTED = "accepted"  # nothing speaks against it
    FITS_BESIDE = "fits beside"  # and there is room for it beside what runs
    FOUND_SERVING = "found serving"  # the target is what serves already
    REFUSED = "refused"
    SPAWNED = "spawned"  # what ran before is gone, the target has a process
    BECAME_READY = "became ready"
    FAILED = "failed"  # the target died, or could not be started
    FELL_SHORT = "fell short"  # of memory, beside what runs
    PROVED = "proved"  # it serves what it should, and generates
    DISPROVED = "disproved"
    STOPPED = "stopped"  # by an operator
    RETURNED = "returned"  # what ran before serves


class Action(Enum):
    """What is to be done."""

    NONE = "none"
    REPLACE = "replace"  # let what runs finish, then start the target
    START_BESIDE = "start beside"  # start the target, and leave what runs alone
    VERIFY = "verify"
    KEEP = "keep"  # the target is the choice from now on
    TAKE_OVER = "take over"  # likewise, and it gets the requests of what ran before, which ends
    DROP = "drop"  # end the target, which nobody has met
    RESTORE = "restore"  # end the target, start what ran before
    GIVE_UP = "give up"  # leave the services as they are; the choice is what it was


RULES: Mapping[Phase, Mapping[Event, tuple[Phase, Action]]] = {
    Phase.CHECKING: {
        Event.STOPPED: (Phase.ABANDONED, Action.NONE),
        Event.ACCEPTED: (Phase.LEAVING, Action.REPLACE),
        Event.FITS_BESIDE: (Phase.LOADING_BESIDE, Action.START_BESIDE),
        Event.FOUND_SERVING: (Phase.SWITCHED, Action.KEEP),
        Event.REFUSED: (Phase.REFUSED, Action.NONE),
    },
    Phase.LEAVING: {
        Event.SPAWNED: (Phase.LOADING, Action.NONE),
        Event.BECAME_READY: (Phase.VERIFYING, Action.VERIFY),
        Event.FAILED: (Phase.RESTORING, Action.RESTORE),
        Event.STOPPED: (Phase.ABANDONED, Action.GIVE_UP),
    },
    Phase.LOADING: {
        Event.BECAME_READY: (Phase.VERIFYING, Action.VERIFY),
        Event.FAILED: (Phase.RESTORING, Action.RESTORE),
        Event.STOPPED: (Phase.ABANDONED, Action.GIVE_UP),
    },
    Phase.VERIFYING: {
        Event.PROVED: (Phase.SWITCHED, Action.KEEP),
        Event.DISPROVED: (Phase.RESTORING, Action.RESTORE),
        Event.FAILED: (Phase.RESTORING, Action.RESTORE),
        Event.STOPPED: (Phase.ABANDONED, Action.GIVE_UP),
    },
    Phase.LOADING_BESIDE: {
        Event.BECAME_READY: (Phase.VERIFYING_BESIDE, Action.VERIFY),
        Event.FELL_SHORT: (Phase.LEAVING, Action.REPLACE),
        Event.FAILED: (Phase.KEPT, Action.DROP),
        Event.STOPPED: (Phase.ABANDONED, Action.DROP),
    },
    Phase.VERIFYING_BESIDE: {
        Event.PROVED: (Phase.SWITCHED, Action.TAKE_OVER),
        Event.DISPROVED: (Phase.KEPT, Action.DROP),
        Event.FELL_SHORT: (Phase.LEAVING, Action.REPLACE),
        Event.FAILED: (Phase.KEPT, Action.DROP),
        Event.STOPPED: (Phase.ABANDONED, Action.DROP),
    },
    Phase.RESTORING: {
        Event.RETURNED: (Phase.RESTORED, Action.NONE),
        Event.FAILED: (Phase.LOST, Action.NONE),
        Event.STOPPED: (Phase.ABANDONED, Action.NONE),
    },
}
"""What is not listed changes nothing."""


PASSING = frozenset({Cause.GPU_MEMORY, Cause.PROMPT_CACHE})
"""Causes of a death that the next try does not share: it is made with less."""

SHORTAGES = frozenset({Cause.GPU_MEMORY, Cause.HOST_MEMORY, Cause.NO_ROOM})
"""Causes of a death that are none where there is more memory."""


def step(phase: Phase, event: Event) -> tuple[Phase, Action]:
    """The phase after `event`, and what is to be done."""
    return RULES.get(phase, {}).get(event, (phase, Action.NONE))


def observe(service: Service, last_generation: int) -> Event | None:
    """What has become of a target that is wanted, and whose last generation was that one.

    Running out of the card's memory is no failure while a smaller plan is tried, nor is dying of a
    saved prompt cache while an empty one is.
    """
    if service.want is Want.DOWN:
        return Event.STOPPED
    if is_blocked(service):
        return Event.FAILED
    if service.generation <= last_generation:
        return None
    death = service.death
    has_died = (
        death is not None and death.generation > last_generation and death.cause not in PASSING
    )
    if has_died or service.state in {State.BACKOFF, State.FAILED}:
        return Event.FAILED
    if service.state in {State.READY, State.UNREADY}:
        return Event.BECAME_READY
    return Event.SPAWNED if service.pid is not None else None


def is_blocked(service: Service) -> bool:
    """Whether it is not started because of what it depends on."""
    return service.want is Want.UP and service.state is State.STOPPED and bool(service.missing)


def observe_beside(service: Service, last_generation: int) -> Event | None:
    """What has become of a target that is started beside what runs.

    Where it runs out of memory, what runs gives way to it after all; and where its first try cannot
    be its last.
    """
    death = service.death
    cause = death.cause if death is not None and death.generation > last_generation else None
    if cause in SHORTAGES | PASSING:
        return Event.FELL_SHORT
    return observe(service, last_generation)


def observe_return(services: Iterable[Service], generations: Mapping[str, int]) -> Event | None:
    """What has become of services that are to come back, in later generations than these."""
    found = tuple(services)
    if any(each.want is Want.DOWN for each in found):
        return Event.STOPPED
    renewed = [each for each in found if each.generation > generations[each.name]]
    has_failed = any(each.state in {State.BACKOFF, State.FAILED} for each in renewed)
    if has_failed or any(map(is_blocked, found)):
        return Event.FAILED
    is_back = len(renewed) == len(found) and all(each.state is State.READY for each in found)
    return Event.RETURNED if is_back else None


@dataclass(frozen=True)
class Story:
    """What is told of a switch.

    `before`: the models that served before it, empty: none. `warm_tokens`: what the target has got
    back of its prompt cache.
    """

    target: str
    model: str
    before: str
    reason: str = ""
    why_lost: str = ""
    was_serving: bool = False
    warm_tokens: int = 0


def message(phase: Phase, story: Story) -> str:
    """The end of a switch in words: what failed, and what serves now."""
    target, model, before = story.target, story.model, story.before
    again = f"{before} serves again" if before else f"{target} is stopped, as it was before"
    still = f"{before} serves as before" if before else "nothing served before"
    ends = {
        Phase.REFUSED: f"nothing was changed, {still}",
        Phase.KEPT: still,
        Phase.RESTORED: again,
        Phase.LOST: f"{before or target} does not come back at once ({story.why_lost})",
    }
    if phase in ends:
        return f"{target} was not switched to {model}: {story.reason}; {ends[phase]}"
    if phase is Phase.ABANDONED:
        return f"{target} was stopped while it was switched to {model}"
    warm = f"; {story.warm_tokens} tokens of earlier conversations are in its cache"
    since = "already" if story.was_serving else "now"
    return f"{target} serves {model} {since}{warm if story.warm_tokens else ''}"
