"""What a request gets for which no upstream answers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.demand import (
    Answer,
    Hold,
    Refuse,
    Repeat,
    Start,
    Swap,
    answer,
    is_cold,
    status,
)
from llmsup.core.events import StartAsked
from llmsup.core.lifecycle import step
from llmsup.core.routing import Endpoint, Member, Route, desired
from llmsup.core.service import Service, State, Want

ROUTE = Route("chat-7b", ("chat", "code"))


def service(name: str, state: State, want: Want = Want.UP) -> Service:
    return Service(name, want=want, state=state)


def asked(chat: Service, code: Service, *on_demand: str) -> Answer:
    return answer(ROUTE, {"chat": chat, "code": code}, on_demand)


DOWN = service("chat", State.STOPPED, Want.DOWN)
CODE_DOWN = service("code", State.STOPPED, Want.DOWN)
CODE_READY = service("code", State.READY)


def test_a_cold_service_is_started() -> None:
    assert asked(DOWN, CODE_DOWN, "chat") == Start("chat")


def test_the_first_of_the_route_is_started_though_another_answers() -> None:
    assert asked(DOWN, CODE_READY, "chat") == Start("chat")


def test_what_was_stopped_by_the_operator_stays_down() -> None:
    refused = asked(DOWN, CODE_DOWN)

    assert refused == Refuse("chat is stopped (not started); code is stopped (not started)")


def test_what_a_switch_is_about_to_bring_up_is_waited_for() -> None:
    """Though nobody wants it up yet; and a fallback answers as long as there is one."""

    def found(code: Service, *expected: str) -> Answer:
        return answer(ROUTE, {"chat": DOWN, "code": code}, (), expected)

    assert found(CODE_DOWN, "code") == Hold()
    assert found(CODE_READY, "chat") == Repeat()
    assert isinstance(found(CODE_DOWN, "another"), Refuse)


def test_what_a_switch_brings_up_is_not_started_beside_it() -> None:
    """Its old model would be loaded, or the model that gives way to it still be there."""
    services = {"chat": DOWN, "code": CODE_DOWN}

    assert answer(ROUTE, services, {"chat"}, {"chat"}) == Hold()
    assert answer(ROUTE, services, (), {"chat"}, {"chat": ""}) == Hold()


def test_a_turn_is_waited_for_though_a_fallback_is_ready() -> None:
    services = {"chat": DOWN, "code": CODE_READY}

    assert answer(ROUTE, services, (), (), {"chat": ""}) == Swap("chat")


def test_while_no_turn_is_tried_the_fallback_answers_or_the_reason_is_told() -> None:
    turns = {"chat": "chat was not switched"}

    assert answer(ROUTE, {"chat": DOWN, "code": CODE_READY}, (), (), turns) == Repeat()
    refused = answer(ROUTE, {"chat": DOWN, "code": CODE_DOWN}, (), (), turns)
    assert refused == Refuse("chat was not switched; code is stopped (not started)")


def test_a_fallback_has_no_turn_while_the_first_one_is_restarted() -> None:
    def found(state: State) -> Answer:
        died = replace(service("chat", state), deaths=(1.0,))
        return answer(ROUTE, {"chat": died, "code": CODE_DOWN}, (), (), {"code": ""})

    assert found(State.BACKOFF) == Hold()
    assert found(State.FAILED) == Swap("code")


def test_a_fallback_answers_while_the_first_one_is_down() -> None:
    assert asked(DOWN, CODE_READY) == Repeat()


def test_a_fallback_does_not_answer_for_one_that_loads() -> None:
    assert asked(service("chat", State.STARTING), CODE_READY, "chat") == Hold()


def test_a_fallback_answers_for_one_that_died_while_it_loads_again() -> None:
    died = replace(service("chat", State.STARTING), deaths=(1.0,))

    assert asked(died, CODE_READY, "chat") == Repeat()


def test_the_fallback_of_one_that_failed_is_started() -> None:
    assert asked(service("chat", State.FAILED), CODE_DOWN, "chat", "code") == Start("code")


@pytest.mark.parametrize(
    "state", [State.STARTING, State.UNREADY, State.DRAINING, State.STOPPING, State.BACKOFF]
)
def test_a_restart_is_waited_for(state: State) -> None:
    assert asked(service("chat", state), CODE_DOWN) == Hold()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Repeat(), "loaded"),
        (Hold(), "loading"),
        (Start("chat"), "sleeping"),
        (Start("code"), "unloaded"),
        (Swap("chat"), "sleeping"),
        (Swap("code"), "unloaded"),
        (Refuse("chat is failed"), "unloaded"),
    ],
)
def test_the_status_of_a_model_is_what_a_request_would_get(found: Answer, said: str) -> None:
    assert status(found, {"chat"}) == said


services = st.builds(
    Service,
    st.sampled_from(["chat", "code", "rag"]),
    want=st.sampled_from(Want),
    state=st.sampled_from(State),
    deaths=st.sampled_from([(), (1.0,)]),
    missing=st.sampled_from([(), ("qdrant",)]),
)
stacks = st.lists(services, min_size=3, max_size=3, unique_by=lambda it: it.name).map(
    lambda them: {it.name: it for it in them}
)
routes = st.lists(st.sampled_from(["chat", "code", "rag"]), min_size=1, unique=True).map(
    lambda names: Route("r", tuple(names))
)
demands = st.sets(st.sampled_from(["chat", "code", "rag"]))


@given(routes, stacks, demands)
def test_a_start_is_asked_once_and_only_of_what_starts_on_demand(
    route: Route, stack: dict[str, Service], on_demand: set[str]
) -> None:
    """Asking ends: what was started is wanted up from then on, whatever its state."""
    started: list[str] = []
    while isinstance(found := answer(route, stack, on_demand), Start):
        started.append(found.service)
        stack = stack | {found.service: step(stack[found.service], StartAsked(True), 5.0)[0]}

    assert len(set(started)) == len(started)
    assert set(started) <= on_demand.intersection(route.services)


turns = st.dictionaries(
    st.sampled_from(["chat", "code", "rag"]), st.sampled_from(["", "it was not switched"])
)


@given(routes, stacks, demands, turns)
def test_a_request_is_repeated_just_when_an_upstream_gets_new_ones(
    route: Route, stack: dict[str, Service], on_demand: set[str], turns: dict[str, str]
) -> None:
    """Else Envoy would be sent round in a circle, or a request would wait in front of a service."""
    brought_up = on_demand | {name for name, why in turns.items() if not why}
    members = {
        name: Member(Endpoint("127.0.0.1", 1), it.state, is_cold=name in brought_up and is_cold(it))
        for name, it in stack.items()
    }
    routable = [it for it in desired((route,), members)["r"] if not it.is_draining]
    found = answer(route, stack, on_demand, (), turns)

    if isinstance(found, Repeat):
        assert routable
    elif not isinstance(found, Start):
        assert not routable


@given(routes, stacks, demands, turns)
def test_who_is_refused_has_nothing_to_wait_for(
    route: Route, stack: dict[str, Service], on_demand: set[str], turns: dict[str, str]
) -> None:
    found = answer(route, stack, on_demand, (), turns)

    if isinstance(found, Refuse):
        assert all(
            stack[name].want is Want.DOWN or stack[name].state is State.FAILED
            for name in route.services
        )
