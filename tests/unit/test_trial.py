"""A profile on trial: it passes once all serve, and fails with the first that does not."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.diagnosis import Cause
from llmsup.core.service import Death, Service, State, Want
from llmsup.core.trial import Failed, Passed, Pending, Phase, Story, judge, message

LAST = {"chat": 3, "rag": 2}
"""chat, a model, and rag, a command, are replaced; embedding is the same in both profiles."""


def service(name: str, state: State = State.READY, generation: int = 9, **rest: object) -> Service:
    made = Service(name, want=Want.UP, state=state, generation=generation, pid=7, why="")
    return replace(made, **rest)  # type: ignore[arg-type]


SERVING = {name: service(name) for name in ("chat", "rag", "embedding")}


def judged(
    *changed: Service, fault: str | None = "", is_rolling: bool = False
) -> Passed | Pending | Failed:
    services = SERVING | {each.name: each for each in changed}
    return judge(services.values(), LAST, {"chat": fault}, is_rolling=is_rolling)


def test_it_passes_once_all_serve_and_the_models_have_proved_themselves() -> None:
    assert judged() == Passed()
    assert judged(fault=None) == Pending()
    assert judged(fault="it serves x.gguf") == Failed("chat: it serves x.gguf")


@pytest.mark.parametrize("name", ["chat", "rag", "embedding"])
@pytest.mark.parametrize("state", [State.STARTING, State.STOPPED, State.DRAINING, State.STOPPING])
def test_what_is_on_its_way_is_waited_for(name: str, state: State) -> None:
    assert judged(service(name, state)) == Pending()


def test_what_is_not_wanted_is_not_waited_for() -> None:
    """Given a job that is done, and services that somebody stopped meanwhile."""
    gone = [service(name, State.STOPPED, want=Want.DOWN) for name in SERVING]
    assert judged(*gone, fault=None) == Passed()


def test_a_model_fails_with_its_first_death_and_the_others_when_they_give_up() -> None:
    death = Death(4, 1.0, Cause.STALLED, "exited with status 1")
    dead = {"state": State.BACKOFF, "death": death, "why": "next try after 1s"}
    assert judged(service("chat", **dead)) == Failed("chat: exited with status 1")  # type: ignore[arg-type]
    for name in ("rag", "embedding"):
        assert judged(service(name, **dead)) == Pending()  # type: ignore[arg-type]
        given_up = service(name, State.FAILED, why="5 deaths within 10m")
        assert judged(given_up) == Failed(f"{name}: 5 deaths within 10m")


@pytest.mark.parametrize("name", ["chat", "rag", "embedding"])
def test_who_depends_on_one_that_is_not_waited_for_fails(name: str) -> None:
    waits = service(name, State.STOPPED, missing=("qdrant",), why="waits for qdrant to be ready")
    assert judged(waits) == Failed(f"{name}: waits for qdrant to be ready")
    assert judged(waits, service("qdrant", State.STARTING)) == Pending()


def test_a_model_that_is_not_placed_fails_with_the_arithmetic() -> None:
    refused = service("chat", State.FAILED, 4, why="4000 MiB needed, 900 MiB free")
    assert judged(refused, fault=None) == Failed("chat: 4000 MiB needed, 900 MiB free")


def test_a_smaller_plan_after_running_out_of_memory_is_waited_for() -> None:
    death = Death(4, 1.0, Cause.GPU_MEMORY, "out of memory")
    assert judged(service("chat", State.STARTING, 5, death=death), fault=None) == Pending()


def test_a_death_under_the_other_profile_is_no_failure() -> None:
    death = Death(3, 1.0, Cause.STALLED, "exited with status 1")
    assert judged(service("chat", death=death)) == Passed()


@pytest.mark.parametrize("name", ["chat", "rag"])
def test_a_process_of_the_other_profile_does_not_count(name: str) -> None:
    old = service(name, generation=LAST[name])
    assert judged(old, is_rolling=True) == Pending()
    assert judged(old) == Failed(f"{name} was not replaced"), "the roll has ended before it"


@given(
    st.lists(
        st.tuples(st.sampled_from(State), st.sampled_from(Want), st.integers(1, 9)),
        min_size=3,
        max_size=3,
    ),
    st.sampled_from(["", "broken", None]),
    st.booleans(),
)
def test_only_what_serves_passes(
    found: list[tuple[State, Want, int]], fault: str | None, is_rolling: bool
) -> None:
    """Given services in any states."""
    services = [
        service(name, state, generation, want=want)
        for name, (state, want, generation) in zip(SERVING, found, strict=True)
    ]
    verdict = judged(*services, fault=fault, is_rolling=is_rolling)
    wanted = [each for each in services if each.want is Want.UP]
    if isinstance(verdict, Passed):
        assert {each.state for each in wanted} <= {State.READY, State.UNREADY}
        assert all(each.generation > LAST.get(each.name, 0) for each in wanted)
        assert not any(each.name == "chat" for each in wanted) or fault == ""
    if any(each.state is State.FAILED and each.name != "chat" for each in wanted):
        assert isinstance(verdict, Failed)


@pytest.mark.parametrize(
    ("phase", "end"),
    [
        (Phase.REFUSED, "nothing was changed, dual serves as before"),
        (Phase.RESTORED, "dual serves again"),
        (Phase.LOST, "dual does not come back at once (chat: gone)"),
        (Phase.STUCK, "dual cannot be brought back (chat: gone), work stays as it is"),
    ],
)
def test_the_message_says_what_failed_and_what_serves(phase: Phase, end: str) -> None:
    story = Story("dual", "work", "it broke", "chat: gone")
    assert message(phase, story) == f"dual was not switched to work: it broke; {end}"


def test_the_message_of_a_success() -> None:
    assert message(Phase.SWITCHED, Story("dual", "work")) == "work serves now"
    already = Story("dual", "dual", was_serving=True)
    assert message(Phase.SWITCHED, already) == "dual serves already"
