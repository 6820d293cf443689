"""Who leaves the card for a service that finds no room on it."""

from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.eviction import LOOK_AGAIN_S, Evict, Fits, Tenant, Wait, make_room

NOW = 100.0
DWELL_S = 10.0
CHAT = Tenant("chat", priority=10, bytes=3000, since=0.0, used_at=50.0)
CODE = Tenant("code", priority=0, bytes=2000, since=0.0, used_at=90.0)
RAG = Tenant("rag", priority=0, bytes=500, since=0.0, used_at=60.0)


def room(needed: int) -> Fits:
    return lambda coming: coming >= needed


def asked(needed: int, *tenants: Tenant, priority: int = 0) -> Evict | Wait | None:
    return make_room(priority, tenants, room(needed), DWELL_S, NOW)


def test_the_lowest_priority_leaves_then_the_least_recently_used() -> None:
    assert asked(400, CHAT, CODE, RAG) == Evict(("rag",))
    assert asked(400, CHAT, CODE, replace(RAG, used_at=95.0)) == Evict(("code",))
    assert asked(2600, CHAT, CODE, RAG) == Evict(("chat",)), "the others alone are too little"


def test_nobody_leaves_in_vain() -> None:
    assert asked(6000, CHAT, CODE, RAG) is None
    assert asked(1000) is None
    assert asked(1500, CHAT, CODE, RAG) == Evict(("code",)), "what rag holds is not needed"


def test_one_at_rest_leaves_even_for_a_lower_priority() -> None:
    assert asked(1000, CHAT, priority=-5) == Evict(("chat",))


def test_one_that_answers_leaves_for_its_own_priority_and_higher_ones_only() -> None:
    busy = replace(CHAT, is_busy=True)

    assert asked(1000, busy, priority=9) == Wait(NOW + LOOK_AGAIN_S, ("chat",), is_sure=False)
    assert asked(1000, busy, priority=10) == Evict(("chat",))


def test_one_that_came_just_now_stays_for_its_dwell_time() -> None:
    new = replace(CHAT, since=NOW - 4)

    assert asked(1000, new) == Wait(NOW + 6, ("chat",))
    assert asked(1000, new, CODE, priority=9) == Evict(("code",))
    assert asked(2600, new, CODE, RAG) == Wait(NOW + 6, ("chat",))
    low = replace(RAG, since=NOW - 4)
    assert asked(400, CHAT, low) == Wait(NOW + 6, ("rag",)), "not the higher one in its stead"
    loading = replace(CHAT, since=None)
    assert asked(1000, loading) == Wait(NOW + LOOK_AGAIN_S, ("chat",))


def test_what_leaves_anyway_is_waited_for() -> None:
    leaving = replace(RAG, is_leaving=True)

    assert asked(400, leaving, CHAT) == Wait(NOW + LOOK_AGAIN_S, ("rag",))
    assert asked(2200, leaving, CODE, CHAT) == Evict(("code",)), "the rest comes from rag"


tenants = st.lists(
    st.builds(
        Tenant,
        st.sampled_from(["a", "b", "c", "d", "e"]),
        priority=st.integers(-2, 2),
        bytes=st.integers(1, 1000),
        since=st.none() | st.floats(0, NOW),
        used_at=st.floats(0, NOW),
        is_busy=st.booleans(),
        is_leaving=st.booleans(),
    ),
    unique_by=lambda each: each.service,
)


@given(tenants, st.integers(1, 4000), st.integers(-3, 3))
def test_what_is_decided_makes_room_and_touches_nobody_who_may_stay(
    them: list[Tenant], needed: int, priority: int
) -> None:
    found = make_room(priority, them, room(needed), DWELL_S, NOW)
    everything = sum(each.bytes for each in them)
    coming = sum(each.bytes for each in them if each.is_leaving)
    if found is None:
        assert everything < needed
        return
    assert everything >= needed
    if isinstance(found, Wait):
        assert NOW < found.until <= NOW + max(DWELL_S, LOOK_AGAIN_S)
        return
    chosen = [each for each in them if each.service in found.services]
    assert coming + sum(each.bytes for each in chosen) >= needed
    for fewer in combinations(chosen, len(chosen) - 1):
        assert coming + sum(each.bytes for each in fewer) < needed, "one leaves in vain"
    for each in chosen:
        assert not each.is_leaving
        assert each.since is not None
        assert NOW - each.since >= DWELL_S
        assert not each.is_busy or each.priority <= priority


@given(tenants, st.integers(1, 4000))
def test_nobody_leaves_where_one_of_lower_claim_would_do(them: list[Tenant], needed: int) -> None:
    found = make_room(9, them, room(needed), 0.0, NOW)
    if not isinstance(found, Evict):
        return
    claim = {each.service: (each.priority, each.used_at, each.service) for each in them}
    first = max(found.services, key=claim.__getitem__)
    below = [each for each in them if each.is_leaving or claim[each.service] < claim[first]]
    assert sum(each.bytes for each in below) < needed
