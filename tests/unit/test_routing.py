"""Upstream lists follow states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.routing import Endpoint, Member, Route, Upstream, desired, diff
from llmsup.core.service import State

CHAT, CODE = Endpoint("127.0.0.1", 8001), Endpoint("127.0.0.1", 8004)
ROUTES = (Route("chat-7b", ("chat", "code"), ("gpt-4o-mini",)), Route("code-7b", ("code", "chat")))


def lists(chat: State, code: State) -> dict[str, list[str]]:
    members = {"chat": Member(CHAT, chat), "code": Member(CODE, code)}
    return {
        name: [
            f"{u.service}{'~' if u.is_draining else ''}{'+' if u.is_fallback else ''}" for u in us
        ]
        for name, us in desired(ROUTES, members).items()
    }


def test_ready_services_stand_in_the_order_of_the_route() -> None:
    assert lists(State.READY, State.READY) == {
        "chat-7b": ["chat", "code+"],
        "code-7b": ["code", "chat+"],
    }


def test_a_fallback_stays_one_when_it_is_alone() -> None:
    assert lists(State.BACKOFF, State.READY) == {"chat-7b": ["code+"], "code-7b": ["code"]}


@pytest.mark.parametrize("state", [State.DRAINING, State.UNREADY])
def test_a_service_that_may_still_answer_is_listed_only_to_be_counted(state: State) -> None:
    assert lists(state, State.READY)["chat-7b"] == ["chat~", "code+"]


def test_diff_names_what_has_to_be_written() -> None:
    chat = (Upstream("chat", CHAT, is_fallback=False),)
    assert diff({"a": chat, "b": ()}, {"a": chat}) == {"b": ()}
    assert diff({"a": chat}, {"a": ()}) == {"a": chat}
    assert diff({"a": chat}, {"a": chat, "gone": ()}) == {}


services = st.sampled_from(["chat", "code", "embedding", "rag"])
routes = st.lists(
    st.lists(services, min_size=1, max_size=4, unique=True), min_size=1, max_size=4
).map(lambda lists: tuple(Route(f"r{n}", tuple(names)) for n, names in enumerate(lists)))
members = st.dictionaries(
    services,
    st.builds(
        Member,
        st.builds(Endpoint, st.just("127.0.0.1"), st.integers(1, 65535)),
        st.sampled_from(State),
    ),
)


@given(routes, members)
def test_routable_is_ready_and_nothing_else_where_none_is_cold(
    routes: tuple[Route, ...], members: dict[str, Member]
) -> None:
    for route, upstreams in zip(routes, desired(routes, members).values(), strict=True):
        routable = [u.service for u in upstreams if not u.is_draining]
        assert routable == [
            name
            for name in route.services
            if name in members and members[name].state is State.READY
        ]
        for upstream in upstreams:
            assert upstream.endpoint == members[upstream.service].endpoint
            assert upstream.is_fallback == (upstream.service != route.services[0])


def test_what_stands_behind_a_cold_service_gets_no_new_request() -> None:
    """It finishes those that it has, and is counted until then."""
    members = {
        "chat": Member(CHAT, State.STOPPED, is_cold=True),
        "code": Member(CODE, State.READY),
    }
    wanted = desired(ROUTES, members)

    assert wanted["chat-7b"] == (Upstream("code", CODE, is_fallback=True, is_draining=True),)
    assert wanted["code-7b"] == (Upstream("code", CODE, is_fallback=False),)
