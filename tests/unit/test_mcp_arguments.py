"""Arguments of tools: what is taken, what is refused and how."""

import pytest

from llmsup.errors import UsageError
from llmsup.mcp import arguments


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (arguments.Switch, {}, "object missing required field model_type"),
        (arguments.Switch, {"model_type": 7}, "model_type: expected str, got int"),
        (arguments.Switch, {"model_type": ""}, "model_type: expected str of length >= 1"),
        (arguments.Why, {"service": "chat", "last": 0}, "last: expected int >= 1"),
        (arguments.Nothing, {"verbose": True}, "unknown field verbose"),
        (arguments.Drill, {"scenarios": [1]}, "scenarios[0]: expected str, got int"),
        (arguments.Plan, {"total_mib": -1}, "total_mib: expected int >= 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    kind: type[arguments.Why], given: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        arguments.parse(given, kind)

    assert message in caught.value.message
    assert caught.value.hint.startswith("arguments of this tool: ")


def test_what_is_left_out_has_its_default() -> None:
    assert arguments.parse({"service": "chat"}, arguments.Why).last == 3


def test_schemas_refuse_what_parse_refuses() -> None:
    made = arguments.schema(arguments.Switch)

    assert (made["type"], made["required"]) == ("object", ["model_type"])
    assert made["additionalProperties"] is False
