from typing import Any

import pytest
from msgspec import UNSET

from llmsup.config.decode import decode
from llmsup.config.interpolated import Interpolated
from llmsup.config.schema import (
    CardIndex,
    CardUuid,
    Ceiling,
    Count,
    GpuLayers,
    Headroom,
    LlamaServer,
    Name,
    Port,
    Profile,
    Readiness,
    Seconds,
    Service,
    Timeout,
)
from llmsup.config.units import Share
from llmsup.config.wording import dotted


def decoded(value: object, wanted: Any) -> tuple[Any, dict[str, str]]:
    found: dict[str, str] = {}
    result = decode(
        value, wanted, ("k",), lambda key, message: found.update({dotted(key): message})
    )
    return result, found


@pytest.mark.parametrize(
    ("value", "wanted", "result"),
    [
        (8001, Port, 8001),
        (Interpolated("8001"), Port, 8001),
        (Interpolated("20"), GpuLayers, 20),
        (Interpolated("all"), GpuLayers, "all"),
        ("all", GpuLayers, "all"),
        (Interpolated("true"), bool, True),
        (Interpolated("12"), str, "12"),
        ("auto", GpuLayers, "auto"),
        (-1, GpuLayers, "all"),
        (Interpolated("-1"), GpuLayers, "all"),
        ("95%", Ceiling, Share(percent=95)),
        (Interpolated("87.5%"), Ceiling, Share(percent=87.5)),
        ("5600MiB", Ceiling, Share(5600 * 2**20)),
        ("0B", Headroom, 0),
        (1, CardIndex | CardUuid, 1),
        (Interpolated("1"), CardIndex | CardUuid, 1),
        ("MIG-GPU-1/2/0", CardIndex | CardUuid, "MIG-GPU-1/2/0"),
        ("250ms", Seconds, 0.25),
        (Interpolated("2s"), Seconds, 2.0),
        (["a", Interpolated("b")], tuple[str, ...], ("a", "b")),
    ],
)
def test_a_valid_value_is_taken(value: object, wanted: Any, result: object) -> None:
    assert decoded(value, wanted) == (result, {})


@pytest.mark.parametrize(
    ("value", "wanted", "words"),
    [
        ("8001", Port, 'expected an integer from 1 to 65535, got "8001"'),
        (Interpolated("many"), Port, 'expected an integer from 1 to 65535, got "many"'),
        (Interpolated(""), Port, 'got ""'),
        (0, Port, "got 0"),
        (65536, Port, "got 65536"),
        (True, Port, "got true"),
        (8001.0, Port, "got 8001.0"),
        pytest.param(0xF << 100_000, Port, "got a huge integer", id="huge"),
        (0, Count, "expected an integer of at least 1, got 0"),
        ("20", GpuLayers, 'expected "auto", "all" or a number of layers, got "20"'),
        (-2, GpuLayers, 'expected "auto", "all" or a number of layers, got -2'),
        (-1.0, GpuLayers, 'expected "auto", "all" or a number of layers, got -1.0'),
        ("95", Ceiling, 'expected a share such as "95%", or a size such as "5600MiB", got "95"'),
        (95, Ceiling, 'expected a share such as "95%", or a size such as "5600MiB", got 95'),
        ("101%", Ceiling, "expected a share above 0% and up to 100%"),
        ("0%", Ceiling, "expected a share above 0% and up to 100%"),
        ("0MiB", Ceiling, "expected a share such as"),
        (256, Headroom, 'expected a size of at most 1TiB with a unit, such as "256MiB", got 256'),
        ("card", CardIndex | CardUuid, "the number of a card, from 0 on or a UUID such as"),
        (-1, CardIndex | CardUuid, "the number of a card, from 0 on or a UUID such as"),
        (10, Seconds, "expected a duration with a unit"),
        (float("nan"), Seconds, "expected a duration with a unit"),
        ("nan", Seconds, "expected a duration with a unit"),
        ("0s", Timeout, "expected a duration above zero"),
        ("a\0b", str, "contains a NUL character"),
        ("\udcff", str, "is not valid UTF-8"),
        (3, str, "expected a string, got 3"),
        ("x", bool, "expected true or false"),
        ("x", tuple[str, ...], 'expected an array, got "x"'),
        ("x" * 500, Port, "x…"),
    ],
)
def test_an_invalid_value_says_what_would_be_valid(value: object, wanted: Any, words: str) -> None:
    result, found = decoded(value, wanted)

    assert result is UNSET
    assert words in found["k"]
    assert len(found["k"]) < 200


@pytest.mark.parametrize("wanted", [Port, Seconds, GpuLayers, bool, Name])
def test_the_value_of_a_variable_is_not_shown(wanted: Any) -> None:
    _, found = decoded(Interpolated("s3\0cret", source="${X}"), wanted)

    assert "the value of ${X}" in found["k"]
    assert "cret" not in found["k"]


def test_text_from_a_variable_stays_known_as_such() -> None:
    result, _ = decoded(Interpolated("x", source="${X}"), str)

    assert result.source == "${X}"


def test_all_problems_of_a_table_are_listed() -> None:
    _, found = decoded({"tcp": 1, "perod": "1s", "timeout": 3, "http_get": "health"}, Readiness)

    assert sorted(found) == ["k.http_get", "k.perod", "k.tcp", "k.timeout"]
    assert found["k.perod"] == 'unknown key; did you mean "period"?'


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    _, found = decoded({"zzzzzz": 1}, Readiness)

    assert "valid here: http_get, tcp, period" in found["k.zzzzzz"]


@pytest.mark.parametrize("kind", [{}, {"kind": "lama"}, {"kind": 3}])
def test_a_service_without_a_known_kind_lists_the_kinds(kind: dict[str, object]) -> None:
    result, found = decoded(kind, Service)

    assert result is UNSET
    assert 'expected "llama-server", "qdrant" or "command"' in found["k.kind"]


def test_a_missing_key_is_named_with_its_type() -> None:
    result, found = decoded({"kind": "llama-server"}, Service)

    assert found == {"k.model": "missing; expected a string that is not empty"}
    assert isinstance(result, LlamaServer)


@pytest.mark.parametrize("value", [3, "x", [], True, [{}]])
def test_a_table_of_another_type_is_refused_at_every_level(value: object) -> None:
    _, found = decoded({"service": value, "models": value, "route": {"r": value}}, Profile)

    assert sorted(found) == ["k.models", "k.route.r", "k.service"]
    assert all("expected a table" in message for message in found.values())
