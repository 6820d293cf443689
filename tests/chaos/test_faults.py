"""The generator of faults: the seed is the whole run."""

from itertools import islice

import pytest

from tests.chaos.faults import (
    DAEMON,
    GATEWAY,
    SERVERS,
    Freeze,
    Kill,
    Reload,
    Shape,
    Steal,
    faults,
    may_be_unavailable,
)


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_repeats_its_run(seed: int) -> None:
    first = list(islice(faults(seed), 200))
    assert first == list(islice(faults(seed), 200))
    assert first != list(islice(faults(seed + 1), 200))
    assert {type(fault) for fault in first} == {Kill, Freeze, Steal, Reload}


def test_the_short_run_has_every_kind() -> None:
    short = list(islice(faults(1), 12))
    assert {type(fault) for fault in short} == {Kill, Freeze, Steal, Reload}
    killed = {name for fault in short if isinstance(fault, Kill) for name in fault.victims}
    assert killed >= {GATEWAY, DAEMON, *SERVERS}


@pytest.mark.parametrize("seed", range(20))
def test_a_reload_changes_what_it_says(seed: int) -> None:
    shape = Shape()
    for fault in islice(faults(seed), 200):
        if isinstance(fault, Reload):
            before, after = shape.revisions, fault.shape.revisions
            assert {name for name in after if after[name] != before[name]} == set(fault.changed)
            shape = fault.shape


def test_only_a_route_without_any_upstream_may_be_unavailable() -> None:
    assert not may_be_unavailable(Kill(("a", "gateway"), 0), "ab")
    assert may_be_unavailable(Kill(("a", "b"), 0), "ab")
    assert may_be_unavailable(Freeze("lone", 1), "lone")
    assert not may_be_unavailable(Reload(Shape(), ("a", "b")), "ba")
    assert may_be_unavailable(Reload(Shape(), ("lone",)), "lone")
