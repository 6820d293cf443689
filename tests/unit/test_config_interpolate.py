import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from llmsup.config.interpolate import filled_in, interpolate
from llmsup.config.interpolated import Interpolated
from llmsup.config.wording import Key


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("plain", "plain"),
        ("${A}", "a"),
        ("x${A}y${A}", "xaya"),
        ("${EMPTY}", ""),
        ("${EMPTY:-d}", "d"),
        ("${NONE:-d}", "d"),
        ("${NONE:-}", ""),
        ("${NONE:-~/m/x-1.gguf}", "~/m/x-1.gguf"),
        ("${NONE:-$$5}", "$5"),
        ("${NONE:-US$5}", "US$5"),
        ("${NONE:-$${A}}", "${A}"),
        ("$$", "$"),
        ("$${A}", "${A}"),
        ("$$$$A", "$$A"),
        ("US$5 $", "US$5 $"),
        ("${TRICK}", "${A}"),
    ],
)
def test_variables_are_filled_in(text: str, result: str) -> None:
    assert filled_in(text, {"A": "a", "EMPTY": "", "TRICK": "${A}"}) == result


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${B}", "${B} is not set"),
        ("${", 'expected "${NAME}"'),
        ("${}", 'expected "${NAME}"'),
        ("${1}", 'expected "${NAME}"'),
        ("${A", 'expected "${NAME}"'),
        ("${A-b}", 'expected "${NAME}"'),
        ("$HOME/models", 'write "${HOME}"'),
        ("${B:-${A}}", "cannot contain another variable"),
        ("${B:-$HOME/models}", "cannot contain another variable"),
        ("${A:-$HOME/models}", "cannot contain another variable"),
    ],
)
def test_what_cannot_be_filled_in_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        filled_in(text, {"A": "a"})


def test_only_text_from_a_variable_is_marked() -> None:
    assert isinstance(filled_in("${A}", {"A": "1"}), Interpolated)
    assert not isinstance(filled_in("$$A", {}), Interpolated)


def test_text_is_spoken_of_as_written_where_a_variable_is_in_it() -> None:
    def source(text: str) -> str:
        filled = filled_in(text, {"A": "a", "EMPTY": ""})
        assert isinstance(filled, Interpolated)
        return filled.source

    assert source("${A}:${B:-1}") == "${A}:${B:-1}"
    assert source("${A:-d}") == "${A:-d}"
    assert source("${B:-d}") == source("${EMPTY:-d}") == ""


def test_every_string_is_reached_and_every_problem_reported() -> None:
    found: list[Key] = []
    raw = {"a": ["${A}", {"b": "${NO}"}], "c": {"d": "${NEITHER}", "n": 3}}

    result = interpolate(raw, {"A": "a"}, (), lambda key, _: found.append(key))

    assert result == {"a": ["a", {"b": UNSET}], "c": {"d": UNSET, "n": 3}}
    assert found == [("a", 1, "b"), ("c", "d")]


@given(st.text(st.sampled_from("${}:-AB_ x")), st.dictionaries(st.sampled_from("AB"), st.text()))
def test_any_text_is_filled_in_or_refused(text: str, variables: dict[str, str]) -> None:
    with suppress(ValueError):
        filled_in(text, variables)


@given(st.text())
def test_doubled_dollars_give_back_the_text(text: str) -> None:
    assert filled_in(text.replace("$", "$$"), {}) == text
