"""Streams whose server dies before the first token, and all that the hold filter must not touch."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import httpx
import pytest
import wasmtime

from llmsup.host import envoy_hold
from tests.contract.conftest import Stack, running, wait_until

CHUNKED = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"


def stub(**wish: Any) -> dict[str, str]:
    return {"x-stub": json.dumps(wish)}


@pytest.fixture(scope="module")
def unheld() -> Iterator[Stack]:
    """An Envoy as it is started where Wasm is missing."""
    with running(holds=False) as stack:
        yield stack


@contextmanager
def prefilling(stack: Stack, count: int = 1, **keys: Any) -> Iterator[list[Future[httpx.Response]]]:
    """Streams of `chat` that have sent their headers and nothing else, for 1.5 s."""
    path = keys.pop("path", "/v1/chat/completions")
    headers = stub(prefill_ms=1500, events=3, interval_ms=1)
    body = {"model": "chat-7b", "stream": True, **keys}
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=stack.client.base_url, timeout=30, limits=limits) as client,
        ThreadPoolExecutor(count) as pool,
    ):
        sent = [pool.submit(client.post, path, json=body, headers=headers) for _ in range(count)]
        wait_until(lambda: stack.in_flight("chat") == count, f"{count} streams in flight")
        time.sleep(0.2)  # the headers are on their way; without the filter they have arrived
        yield sent


def test_assembled_module_is_that_of_the_text() -> None:
    text = (files("llmsup.services") / "hold.wat").read_text()

    assert bytes(wasmtime.wat2wasm(text)) == envoy_hold.module()


def test_streams_killed_before_their_first_byte_are_answered_by_the_next(stack: Stack) -> None:
    with prefilling(stack, 20) as sent:
        stack.stubs["chat"].kill()

        answers = [each.result() for each in sent]

    assert {(it.status_code, it.headers["x-llmsup-service"]) for it in answers} == {(200, "code")}
    assert {it.headers["x-llmsup-fallback"] for it in answers} == {"true"}
    for each in answers:
        assert each.content.endswith(b"data: [DONE]\n\n")
        assert b"code-0" in each.content
        assert b"chat-" not in each.content


def test_without_the_filter_such_a_stream_breaks(unheld: Stack) -> None:
    """What the filter is for. Once Envoy itself repeats such a stream, it can go."""
    with prefilling(unheld) as sent:
        unheld.stubs["chat"].kill()

        with pytest.raises(httpx.RemoteProtocolError):
            sent[0].result()
    unheld.start_stub("chat")


def test_stream_with_nobody_left_is_503_and_not_an_empty_200(stack: Stack) -> None:
    stack.stubs["code"].kill()
    with prefilling(stack) as sent:
        stack.stubs["chat"].kill()

        answer = sent[0].result()

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_unavailable"
    assert "x-llmsup-service" not in answer.headers


def test_stream_that_may_change_state_is_not_repeated(stack: Stack) -> None:
    path = "/v1/responses"
    before = stack.stubs["code"].requests(path)
    with prefilling(stack, path=path) as sent:
        stack.stubs["chat"].kill()

        assert sent[0].result().status_code == 503

    assert stack.stubs["code"].requests(path) == before


def test_body_of_20_mb_is_repeated_for_a_stream(stack: Stack) -> None:
    with prefilling(stack, prompt="abcdefghij" * 2_000_000) as sent:
        stack.stubs["chat"].kill()

        answer = sent[0].result()

    assert answer.headers["x-llmsup-service"] == "code"
    assert answer.content.endswith(b"data: [DONE]\n\n")


def test_stream_killed_after_its_first_byte_is_cut_within_100_ms(stack: Stack) -> None:
    headers = stub(events=1000, interval_ms=10)
    body = {"model": "chat-7b", "stream": True}
    delays = []
    for _ in range(5):
        with stack.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as it:
            chunks = it.iter_raw()
            next(chunks)
            killed = time.monotonic()
            stack.stubs["chat"].kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(chunks)
            delays.append(time.monotonic() - killed)
        stack.start_stub("chat")
        stack.settle()

    assert min(delays) < 0.1  # the quickest: the others may wait for this machine


def test_first_event_is_not_held_for_the_second(stack: Stack) -> None:
    headers = stub(events=2, interval_ms=700)
    body = {"model": "chat-7b", "stream": True}
    with stack.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        first = time.monotonic()
        content = answer.read()

    assert time.monotonic() - first > 0.3  # the answer began well before its end
    assert content.count(b"data: ") == 4


def test_ping_before_the_first_token_lets_the_headers_go(stack: Stack) -> None:
    ping = ":\n\n"
    raw = f"{CHUNKED}content-type: text/event-stream\r\n\r\n{len(ping):x}\r\n{ping}\r\n"
    body = {"model": "chat-7b", "stream": True}
    headers = stub(raw=raw)
    with stack.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_raw()) == ping.encode()


@pytest.mark.parametrize(
    "raw",
    [
        "HTTP/1.1 204 No Content\r\nx-kind: empty\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\netag: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        "HTTP/1.1 400 Bad Request\r\ncontent-length: 3\r\n\r\nbad",
        "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nretry-after: 7\r\n\r\n",
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno",
        f"{CHUNKED}\r\n0\r\n\r\n",
        f"{CHUNKED}\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        f"{CHUNKED}trailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
        f"{CHUNKED}trailer: x-sum\r\n\r\n0\r\nx-sum: 1\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
def test_answers_of_every_shape_are_the_same_with_and_without(
    stack: Stack, unheld: Stack, raw: str
) -> None:
    def told(through: Stack) -> tuple[int, bytes, dict[str, str]]:
        answer = through.ask(headers=stub(raw=raw))
        headers = {name: text for name, text in answer.headers.items() if name != "date"}
        return answer.status_code, answer.content, headers

    held = told(stack)

    assert held == told(unheld)
    assert held[0] == int(raw.rpartition("HTTP/1.1 ")[2][:3])
    assert held[2]["x-llmsup-service"] == "chat"


def test_answer_without_a_length_ends_with_its_connection(stack: Stack, unheld: Stack) -> None:
    wish = stub(raw="HTTP/1.1 200 OK\r\n\r\nuntil the end", close=True)
    answers = [through.ask(path="/v1/anything", headers=wish) for through in (stack, unheld)]

    assert [each.status_code for each in answers] == [200, 200]
    assert [each.content for each in answers] == [b"until the end"] * 2


def test_head_is_answered_at_once(stack: Stack) -> None:
    """Headers that announce a body which never comes."""
    raw = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
    body = b'{"model": "chat-7b"}'
    head = f"HEAD /v1/anything HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", stack.port), timeout=10) as client:
        client.sendall(f"{head}x-stub: {json.dumps({'raw': raw})}\r\n\r\n".encode() + body)
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-length: 1000" in answer


def test_stream_of_thousands_of_events_passes(stack: Stack) -> None:
    events = stub(events=20_000, interval_ms=0)
    body = {"model": "chat-7b", "stream": True}
    direct = httpx.post(
        f"http://127.0.0.1:{stack.stubs['chat'].port}/v1/chat/completions",
        json=body, headers=events, timeout=60,
    )  # fmt: skip

    assert stack.ask(stream=True, headers=events).content == direct.content


def test_client_that_leaves_before_the_first_token_frees_the_server(stack: Stack) -> None:
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post(
            "/v1/chat/completions",
            json={"model": "chat-7b", "stream": True},
            headers=stub(prefill_ms=3000),
            timeout=0.3,
        )

    wait_until(lambda: stack.in_flight("chat") == 0, "nothing in flight", 2.0)
