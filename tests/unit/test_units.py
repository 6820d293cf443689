from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.units import (
    Share,
    duration,
    parse_duration_s,
    parse_share,
    parse_size_bytes,
    size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("10s", 10.0), ("1.5s", 1.5), ("5m", 300.0), ("1h30m", 5400.0), ("0s", 0.0)],
)
def test_a_duration_is_read_with_its_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "s", "-1s", "1 s", "1S", "nan", "inf", "1e3s", "1s!", "١s", "9" * 400 + "d"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (0.9999, "1s"),
        (59.99, "1m"),
        (90, "1m30s"),
        (3600, "1h"),
        (86461, "1d1m1s"),
    ],
)
def test_a_duration_is_written_as_a_person_would(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e9))
def test_what_is_written_can_be_read_again_and_is_nearly_the_same(seconds: float) -> None:
    assert parse_duration_s(duration(seconds)) == pytest.approx(seconds, rel=0.01, abs=0.0006)


@given(st.text())
def test_no_text_does_more_than_be_refused(text: str) -> None:
    with suppress(ValueError):
        assert parse_duration_s(text) >= 0


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("512KiB", 512 * 1024), ("10MiB", 10 * 2**20), ("1.5GiB", 3 * 2**29), ("1TiB", 2**40)],
)
def test_a_size_is_read_with_its_unit(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "10", "MiB", "10MB", "10 MiB", "-1MiB", "1e3MiB", "10mib", "inf", "9" * 400 + "B"]
)
def test_a_size_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size with a unit"):
        parse_size_bytes(text)


@given(st.integers(0, 2**53))
def test_a_size_is_written_as_it_is_read(size_bytes: int) -> None:
    with suppress(ValueError):  # more digits than anybody would write
        assert parse_size_bytes(size(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    ("text", "part_bytes"),
    [("95%", 950), ("0.1%", 1), ("100%", 1000), ("600B", 600), ("1KiB", 1000)],
)
def test_a_share_is_a_part_of_a_whole(text: str, part_bytes: int) -> None:
    assert parse_share(text).of(1000) == part_bytes


@pytest.mark.parametrize(
    "text", ["", "%", "95", "95 %", "-5%", "100.1%", "0%", "0MiB", "1e1%", "nan%"]
)
def test_a_share_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        parse_share(text)


@given(st.one_of(st.integers(1, 10**8).map(lambda n: n / 10**6), st.integers(1, 2**50)))
def test_a_share_is_written_as_it_is_read(amount: float) -> None:
    share = Share(amount) if isinstance(amount, int) else Share(percent=amount)
    with suppress(ValueError):  # more digits than anybody would write
        assert parse_share(str(share)) == share
