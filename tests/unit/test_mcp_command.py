"""What a verb of the command line printed, taken apart."""

import pytest

from llmsup.errors import LlmsupError
from llmsup.mcp.command import parse


def test_data_words_error_and_hint_are_told_apart() -> None:
    said = parse(1, '{"fits": false}\n', "dual is up\nerror: too large\nhint: less layers\n")

    assert (said.json(), said.words) == ({"fits": False}, "dual is up")
    assert (said.error, said.hint) == ("too large", "less layers")


def test_no_data_is_the_error_that_was_said() -> None:
    with pytest.raises(LlmsupError) as caught:
        parse(3, "", "error: llmsup is not running\nhint: llmsup start\n").json()

    assert (caught.value.message, caught.value.hint) == ("llmsup is not running", "llmsup start")


def test_several_errors_are_one_line() -> None:
    assert parse(2, "", "error: a\nerror: b\n").error == "a; b"


def test_a_verb_that_was_killed_has_an_error_too() -> None:
    with pytest.raises(LlmsupError, match="it said nothing"):
        parse(-9, "", "").json()
