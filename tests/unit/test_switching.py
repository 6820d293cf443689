"""The phases of a switch: every way ends with the target serving, or with what ran before."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.diagnosis import Cause
from llmsup.core.service import Death, Service, State, Want
from llmsup.core.switching import (
    BESIDE,
    ENDS,
    RULES,
    SHORTAGES,
    Action,
    Event,
    Phase,
    Story,
    message,
    observe,
    observe_beside,
    observe_return,
    step,
)

BEFORE = 3
STORY = Story("chat", "b.gguf", "chat (a.gguf)", "it broke")


def service(state: State, generation: int = BEFORE + 1, **changed: object) -> Service:
    made = Service("chat", want=Want.UP, state=state, generation=generation, pid=7)
    return replace(made, **changed)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_every_way_ends_with_the_target_or_with_what_ran_before(events: list[Event]) -> None:
    """Given any events in any order."""
    phase, done = Phase.CHECKING, [Action.NONE]
    for event in events:
        before = phase
        phase, action = step(phase, event)
        if action is not Action.NONE:
            done.append(action)
        assert before not in ENDS or (phase is before and action is Action.NONE)
    is_replaced = Action.REPLACE in done
    chosen = {Action.KEEP, Action.TAKE_OVER}
    if phase is Phase.SWITCHED:
        assert done[-1] in chosen, "it is chosen once it serves, and never before"
        assert (done[-1] is Action.TAKE_OVER) is (Action.START_BESIDE in done and not is_replaced)
    else:
        assert chosen.isdisjoint(done)
    if phase is Phase.REFUSED:
        assert done == [Action.NONE]
    if phase is Phase.KEPT:
        assert not is_replaced
        assert done[-1] is Action.DROP
    if phase in {Phase.RESTORED, Phase.LOST}:
        assert done[-1] is Action.RESTORE
    if phase is Phase.ABANDONED:
        assert done[-1] in {Action.GIVE_UP, Action.RESTORE, Action.DROP} or done == [Action.NONE]
    assert done.count(Action.REPLACE) <= 1
    assert done.count(Action.VERIFY) <= 1 + is_replaced


def test_the_table_has_a_way_on_from_every_phase_and_none_from_an_end() -> None:
    assert RULES.keys() == set(Phase) - ENDS
    reached = {phase for rules in RULES.values() for phase, _ in rules.values()}
    assert reached == set(Phase) - {Phase.CHECKING}
    for phase in RULES:
        seen, ahead = set[Phase](), [phase]
        while ahead:
            now = ahead.pop()
            if now not in seen:
                seen.add(now)
                ahead += [after for after, _ in RULES.get(now, {}).values()]
        assert seen & ENDS


@pytest.mark.parametrize("phase", [Phase.LEAVING, Phase.LOADING, Phase.VERIFYING])
def test_nothing_that_was_begun_is_left_when_it_fails(phase: Phase) -> None:
    assert step(phase, Event.FAILED) == (Phase.RESTORING, Action.RESTORE)
    assert step(phase, Event.STOPPED) == (Phase.ABANDONED, Action.GIVE_UP)


@pytest.mark.parametrize("phase", sorted(BESIDE, key=str))
def test_what_runs_goes_on_where_one_beside_it_fails_for_another_reason_than_memory(
    phase: Phase,
) -> None:
    assert step(phase, Event.FAILED) == (Phase.KEPT, Action.DROP)
    assert step(phase, Event.STOPPED) == (Phase.ABANDONED, Action.DROP)
    assert step(phase, Event.FELL_SHORT) == (Phase.LEAVING, Action.REPLACE)


@pytest.mark.parametrize(
    ("seen", "event"),
    [
        (service(State.DRAINING, BEFORE), None),
        (service(State.READY, BEFORE), None),
        (service(State.STARTING, pid=None), None),
        (service(State.STARTING), Event.SPAWNED),
        (service(State.READY), Event.BECAME_READY),
        (service(State.BACKOFF, pid=None), Event.FAILED),
        (service(State.FAILED, pid=None), Event.FAILED),
        (service(State.DRAINING, BEFORE, want=Want.DOWN), Event.STOPPED),
        (service(State.STOPPED, want=Want.DOWN), Event.STOPPED),
        (service(State.STOPPED, BEFORE, missing=("qdrant",)), Event.FAILED),
        (service(State.DRAINING, BEFORE, missing=("qdrant",)), None),
    ],
)
def test_what_is_seen_of_a_target(seen: Service, event: Event | None) -> None:
    assert observe(seen, BEFORE) is event


def test_a_death_is_a_failure_unless_the_next_try_is_made_with_less() -> None:
    """Also where the next process is there already: the first death costs no delay."""
    crash = Death(BEFORE + 1, 0.0, Cause.UNKNOWN, "exited")
    again = service(State.STARTING, BEFORE + 2)
    assert observe(replace(again, death=crash), BEFORE) is Event.FAILED
    assert observe(replace(again, death=replace(crash, generation=BEFORE)), BEFORE) is Event.SPAWNED
    for cause in (Cause.GPU_MEMORY, Cause.PROMPT_CACHE):
        passing = replace(crash, cause=cause)
        assert observe(replace(again, death=passing), BEFORE) is Event.SPAWNED


@pytest.mark.parametrize("cause", sorted(SHORTAGES | {Cause.PROMPT_CACHE}, key=str))
def test_one_beside_that_had_too_little_or_too_much_has_not_failed_yet(cause: Cause) -> None:
    death = Death(BEFORE + 1, 0.0, cause, "out of memory")
    dead = service(State.FAILED, pid=None, death=death)
    assert observe_beside(dead, BEFORE) is Event.FELL_SHORT
    assert observe_beside(replace(dead, death=None), BEFORE) is Event.FAILED
    assert observe_beside(replace(dead, death=replace(death, generation=BEFORE)), BEFORE) is (
        Event.FAILED
    )
    assert observe_beside(service(State.READY), BEFORE) is Event.BECAME_READY


def test_what_ran_before_has_returned_once_all_of_it_is_ready_anew() -> None:
    last = {"chat": BEFORE}
    assert observe_return([service(State.READY, BEFORE)], last) is None
    assert observe_return([service(State.STARTING)], last) is None
    assert observe_return([service(State.READY)], last) is Event.RETURNED
    assert observe_return([service(State.FAILED)], last) is Event.FAILED
    assert observe_return([service(State.READY, want=Want.DOWN)], last) is Event.STOPPED
    assert observe_return([], {}) is Event.RETURNED, "nothing ran before"


@pytest.mark.parametrize(
    ("phase", "story", "words"),
    [
        (Phase.SWITCHED, STORY, "chat serves b.gguf now"),
        (Phase.SWITCHED, replace(STORY, was_serving=True), "chat serves b.gguf already"),
        (
            Phase.SWITCHED,
            replace(STORY, warm_tokens=1840),
            "chat serves b.gguf now; 1840 tokens of earlier conversations are in its cache",
        ),
        (
            Phase.REFUSED,
            STORY,
            "chat was not switched to b.gguf: it broke; nothing was changed, "
            "chat (a.gguf) serves as before",
        ),
        (
            Phase.KEPT,
            STORY,
            "chat was not switched to b.gguf: it broke; chat (a.gguf) serves as before",
        ),
        (
            Phase.RESTORED,
            STORY,
            "chat was not switched to b.gguf: it broke; chat (a.gguf) serves again",
        ),
        (
            Phase.RESTORED,
            replace(STORY, before=""),
            "chat was not switched to b.gguf: it broke; chat is stopped, as it was before",
        ),
        (
            Phase.LOST,
            replace(STORY, why_lost="port 8001 is held"),
            "chat was not switched to b.gguf: it broke; chat (a.gguf) does not come back at once "
            "(port 8001 is held)",
        ),
        (Phase.ABANDONED, STORY, "chat was stopped while it was switched to b.gguf"),
    ],
)
def test_the_end_in_words(phase: Phase, story: Story, words: str) -> None:
    assert message(phase, story) == words
