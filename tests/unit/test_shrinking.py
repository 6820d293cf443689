"""What follows a service that ran out of the card's memory."""

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.shrinking import SHORT_MIN_BYTES, Shrunk, loaded, shrink

MIB = 2**20


def test_the_first_step_is_as_large_as_what_was_missing() -> None:
    assert shrink(None, 3000 * MIB, 2900 * MIB, 189 * MIB).at_most_bytes == 2811 * MIB


def test_three_steps_lead_off_the_card() -> None:
    first = shrink(None, 3000 * MIB, 2900 * MIB, None)
    second = shrink(first, first.at_most_bytes, 2900 * MIB, None)
    third = shrink(second, second.at_most_bytes, 2900 * MIB, None)
    bounds = [each.at_most_bytes // MIB for each in (first, second, third)]
    assert bounds == [2936, 2202, 0]


def test_a_load_that_went_well_in_between_begins_the_count_anew() -> None:
    first = shrink(None, 3000 * MIB, 2900 * MIB, None)
    later = shrink(loaded(shrink(first, 2900 * MIB, 2900 * MIB, None)), 2000 * MIB, 2900 * MIB, 0)
    assert later.at_most_bytes == 1936 * MIB


def test_it_is_forgotten_once_there_is_clearly_more_room() -> None:
    shrunk = Shrunk(2000 * MIB, 2500 * MIB, 100 * MIB, 1)
    assert shrunk.still_holds(2600 * MIB)
    assert not shrunk.still_holds(2500 * MIB + 100 * MIB + SHORT_MIN_BYTES)
    assert shrunk.still_holds(None)


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 2**34)), min_size=3, max_size=6),
    st.integers(1, 2**34),
)
def test_whatever_is_missing_each_step_is_smaller_and_the_third_is_nothing(
    missing: list[int | None], planned: int
) -> None:
    shrunk = None
    for steps, short in enumerate(missing, start=1):
        shrunk = shrink(shrunk, planned, None, short)
        assert shrunk.at_most_bytes < planned
        assert shrunk.at_most_bytes == 0 or steps < 3
        planned = max(1, shrunk.at_most_bytes)
