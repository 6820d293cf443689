"""The judge of the loops over a switch: each fault that it is to find is found."""

import json
from dataclasses import replace

import pytest

from bench.witness import Said, Turn, faults, heard, question
from llmsup.drill.traffic import Record

TOKENS = {"small": 20, "large": 30}
TURNS = (
    Turn("chat", "small", 0.0, 10.0),
    Turn("chat", "large", 9.0, 99.0),
    Turn("code", "large", 0.0, 99.0),
)
ROUTE = ("chat", "code")


def whole(service: str, prompt_tokens: int) -> bytes:
    return json.dumps({"model": service, "usage": {"prompt_tokens": prompt_tokens}}).encode()


def streamed(service: str, prompt_tokens: int, *, is_done: bool = True) -> bytes:
    chunks: list[dict[str, object]] = [
        {"model": service, "usage": None},
        {"model": service, "usage": {"prompt_tokens": prompt_tokens}},
    ]
    lines = [b"data: " + json.dumps(each).encode() for each in chunks]
    return b"\n\n".join([*lines, b"data: [DONE]" if is_done else b"", b""])


def answered(
    service: str, prompt_tokens: int, sent_at: float, answered_at: float, *, fallback: bool = False
) -> Record:
    body = whole(service, prompt_tokens)
    return Record(sent_at, answered_at, 200, service, fallback, body=body)


def found(record: Record) -> list[str]:
    return list(faults([record], ROUTE, TURNS, TOKENS))


@pytest.mark.parametrize(
    "record",
    [
        answered("chat", 20, 1, 2),
        answered("chat", 20, 9.9, 12),
        answered("chat", 30, 8, 9.1),
        answered("chat", 30, 20, 21),
        answered("code", 30, 1, 2, fallback=True),
        replace(answered("chat", 20, 1, 2), body=streamed("chat", 20)),
    ],
)
def test_a_right_answer_has_no_fault(record: Record) -> None:
    assert found(record) == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (answered("chat", 30, 1, 2), "answered as ['large'], and not as {'small'}"),
        (answered("chat", 20, 20, 21), "answered as ['small'], and not as {'large'}"),
        (answered("chat", 25, 1, 2), "no known model"),
        (answered("code", 20, 1, 2, fallback=True), "code answered as ['small']"),
        (answered("code", 30, 1, 2), "x-llmsup-fallback: False"),
        (answered("chat", 20, 1, 2, fallback=True), "x-llmsup-fallback: True"),
        (replace(answered("code", 30, 1, 2, fallback=True), service="chat"), "the header says"),
        (replace(answered("chat", 20, 1, 2), status=503, error="no"), "503 no"),
        (replace(answered("chat", 20, 1, 2), body=b"{}"), "no whole answer"),
        (
            replace(answered("chat", 20, 1, 2), body=streamed("chat", 20, is_done=False)),
            "ends before it is done",
        ),
    ],
)
def test_a_fault_is_found(record: Record, words: str) -> None:
    assert any(words in each for each in found(record)), found(record)


def test_a_stream_tells_what_a_whole_answer_tells() -> None:
    assert heard(streamed("chat", 7)) == heard(whole("chat", 7)) == Said("chat", 7)
    assert json.loads(question("r", is_stream=True))["stream_options"] == {"include_usage": True}
