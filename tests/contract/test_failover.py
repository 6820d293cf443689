"""What a client sees while upstreams die, hang, refuse or answer badly."""

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from llmsup.core.service import State
from tests.contract.conftest import READY, Stack, wait_until


def stub(**wish: Any) -> dict[str, str]:
    """A request header that tells the stub how to answer."""
    return {"x-stub": json.dumps(wish)}


@contextmanager
def in_flight(
    stack: Stack, count: int, service: str = "chat", **keys: Any
) -> Iterator[list[Future[httpx.Response]]]:
    """`count` requests that `service` is answering while the block runs."""
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=stack.client.base_url, timeout=30, limits=limits) as client,
        ThreadPoolExecutor(count) as pool,
    ):
        path = keys.pop("path", "/v1/chat/completions")
        headers = keys.pop("headers", stub(delay_ms=400))
        body = {"model": "chat-7b", **keys}
        futures = [pool.submit(client.post, path, json=body, headers=headers) for _ in range(count)]
        wait_until(lambda: stack.in_flight(service) == count, f"{count} requests in flight")
        yield futures


def services(futures: list[Future[httpx.Response]]) -> set[tuple[int, str | None, str | None]]:
    """Status, service and fallback of all answers."""
    answers = [future.result() for future in futures]
    return {
        (it.status_code, it.headers.get("x-llmsup-service"), it.headers.get("x-llmsup-fallback"))
        for it in answers
    }


def test_kill_of_the_primary_fails_no_request_in_flight(stack: Stack) -> None:
    with in_flight(stack, 20) as futures:
        stack.stubs["chat"].kill()

        assert services(futures) == {(200, "code", "true")}


def test_hundreds_of_concurrent_retries_are_not_cut(stack: Stack) -> None:
    """Given Envoy's default of 3 concurrent retries, all but three would end as 503."""
    with in_flight(stack, 250, headers=stub(delay_ms=1500)) as futures:
        stack.stubs["chat"].kill()

        assert services(futures) == {(200, "code", "true")}


def test_dead_priorities_are_skipped_before_the_list_is_rewritten(stack: Stack) -> None:
    stack.stubs["chat"].kill()

    for _ in range(50):
        assert stack.ask().headers["x-llmsup-service"] == "code"


def test_hung_upstream_answers_nobody_until_it_is_killed(stack: Stack) -> None:
    stack.stubs["chat"].signal(signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(stack.ask) for _ in range(4)]
        wait_until(lambda: stack.in_flight("chat") == 4, "4 requests in flight")
        assert not any(future.done() for future in futures)

        stack.stubs["chat"].kill()

        assert services(futures) == {(200, "code", "true")}


def test_fail_back_after_the_list_is_rewritten(stack: Stack) -> None:
    stack.stubs["chat"].kill()
    stack.publish({"code": State.READY})
    answer = stack.ask()
    assert answer.headers["x-llmsup-service"] == "code"
    assert answer.headers["x-llmsup-fallback"] == "true"

    stack.start_stub("chat")
    stack.publish(READY)

    assert stack.ask().headers["x-llmsup-service"] == "chat"


def test_all_dead_is_503_from_the_gateway(stack: Stack) -> None:
    for service in READY:
        stack.stubs[service].kill()

    response = stack.ask()

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert "x-llmsup-service" not in response.headers


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_status_of_a_server_is_an_answer(stack: Stack, status: int) -> None:
    path = f"/v1/status-{status}"
    before = {name: it.requests(path) for name, it in stack.stubs.items()}

    response = stack.ask(path=path, headers=stub(status=status))

    assert response.status_code == status
    assert response.json() == {
        "error": {"message": f"stub says {status}", "type": "stub_error", "code": status}
    }
    assert response.headers["x-llmsup-service"] == "chat"
    assert "retry-after" not in response.headers
    after = {name: it.requests(path) for name, it in stack.stubs.items()}
    assert after == before | {"chat": before["chat"] + 1}


def test_unanswered_request_is_repeated_on_the_next_upstream(stack: Stack) -> None:
    path = "/v1/completions"
    before = stack.stubs["code"].requests(path)

    response = stack.ask(path=path, headers=stub(reset=True))

    assert response.status_code == 503
    assert stack.stubs["code"].requests(path) > before


@pytest.mark.parametrize(("model", "tries"), [("chat-7b", [2, 1]), ("code-7b", [0, 2])])
def test_poison_request_is_given_to_few_servers(stack: Stack, model: str, tries: list[int]) -> None:
    """One more try than the route has services: a request that crashes servers ends soon."""
    path = "/v1/embeddings"
    before = [it.requests(path) for it in stack.stubs.values()]

    response = stack.ask(model, path=path, headers=stub(reset=True))

    assert response.status_code == 503
    after = [it.requests(path) for it in stack.stubs.values()]
    assert [now - then for now, then in zip(after, before, strict=True)] == tries


@pytest.mark.parametrize(
    ("path", "arrives_at"),
    [
        ("/v1/responses", "/v1/responses"),
        ("/v1//responses", "/v1/responses"),
        ("//v1///responses//", "/v1/responses/"),
        ("/v1/responses/resp_1/cancel", "/v1/responses/resp_1/cancel"),
        ("/v1/anything", "/v1/anything"),
        ("/v1/chat/completions/", "/v1/chat/completions/"),
    ],
)
def test_path_that_may_change_state_is_not_repeated_once_sent(
    stack: Stack, path: str, arrives_at: str
) -> None:
    before = {name: it.requests(arrives_at) for name, it in stack.stubs.items()}
    url = stack.client.base_url.copy_with(raw_path=path.encode())

    response = stack.client.post(url, json={"model": "chat-7b"}, headers=stub(reset=True))

    assert response.status_code == 503
    after = {name: it.requests(arrives_at) for name, it in stack.stubs.items()}
    assert after == before | {"chat": before["chat"] + 1}


def test_path_that_changes_state_still_skips_a_dead_upstream(stack: Stack) -> None:
    stack.stubs["chat"].kill()

    assert stack.ask(path="/v1/responses").headers["x-llmsup-service"] == "code"


def large_body() -> bytes:
    return b'{"model": "chat-7b", "prompt": "' + b"abcdefghij" * 2_000_000 + b'"}'


def test_body_of_20_mb_arrives_intact(stack: Stack) -> None:
    body = large_body()

    response = stack.client.post("/v1/completions", content=body)

    assert response.json()["stub"]["sha256"] == hashlib.sha256(body).hexdigest()


def test_body_of_20_mb_arrives_intact_when_it_is_repeated(stack: Stack) -> None:
    body = large_body()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            stack.client.post, "/v1/completions", content=body, headers=stub(delay_ms=300)
        )
        wait_until(lambda: stack.in_flight("chat") == 1, "the request is in flight")
        stack.stubs["chat"].kill()
        response = future.result()

    assert response.headers["x-llmsup-service"] == "code"
    assert response.json()["stub"]["bytes"] == len(body)
    assert response.json()["stub"]["sha256"] == hashlib.sha256(body).hexdigest()


def test_stream_passes_untouched_and_at_once(stack: Stack) -> None:
    headers = stub(events=5, interval_ms=60)
    body = {"model": "chat-7b", "stream": True}
    stub_url = f"http://127.0.0.1:{stack.stubs['chat'].port}/v1/chat/completions"
    direct = httpx.post(stub_url, json=body, headers=headers)

    arrived: list[float] = []
    content = b""
    with stack.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        for chunk in answer.iter_raw():
            arrived.append(time.monotonic())
            content += chunk

    assert content == direct.content
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-llmsup-service"] == "chat"
    assert answer.headers["x-llmsup-fallback"] == "false"
    assert len(arrived) >= 5
    assert arrived[-1] - arrived[0] > 0.15


def test_stream_of_the_fallback_says_so(stack: Stack) -> None:
    stack.stubs["chat"].kill()

    response = stack.ask(stream=True, headers=stub(events=1, interval_ms=1))

    assert b"code-0" in response.content
    assert response.headers["x-llmsup-service"] == "code"
    assert response.headers["x-llmsup-fallback"] == "true"


def test_stream_cut_by_a_kill_ends_at_once_and_visibly(stack: Stack) -> None:
    """Once bytes are out nothing can be repeated; the client must see a break, not an end."""
    headers = stub(events=1000, interval_ms=10)
    body = {"model": "chat-7b", "stream": True}
    with stack.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        stack.stubs["chat"].kill()
        killed = time.monotonic()
        with pytest.raises(httpx.RemoteProtocolError):
            list(chunks)

    assert time.monotonic() - killed < 0.5


def test_silent_upstream_is_waited_for(stack: Stack) -> None:
    response = stack.ask(headers=stub(delay_ms=1500))

    assert response.headers["x-llmsup-service"] == "chat"


def test_client_that_leaves_frees_the_upstream(stack: Stack) -> None:
    with pytest.raises(httpx.ReadTimeout):
        stack.client.post(
            "/v1/chat/completions",
            json={"model": "chat-7b"},
            headers=stub(delay_ms=3000),
            timeout=0.2,
        )

    wait_until(lambda: stack.in_flight("chat") == 0, "nothing in flight", 1.0)


def test_client_cannot_change_what_is_retried(stack: Stack) -> None:
    path = "/v1/embeddings"
    before = {name: it.requests(path) for name, it in stack.stubs.items()}
    asked = {"x-envoy-retry-on": "5xx,retriable-4xx", "x-envoy-max-retries": "9"}

    response = stack.ask(path=path, headers=stub(status=503) | asked)

    assert response.status_code == 503
    after = {name: it.requests(path) for name, it in stack.stubs.items()}
    assert after == before | {"chat": before["chat"] + 1}


def test_repeated_kills_under_load_fail_nothing(stack: Stack) -> None:
    """Clients ask without a pause while the primary is killed and comes back."""
    stop = threading.Event()
    failures: list[str] = []
    counts: list[int] = []

    def client(ask: Callable[..., httpx.Response]) -> None:
        count = 0
        while not stop.is_set():
            response = ask(
                "/v1/chat/completions", json={"model": "chat-7b"}, headers=stub(delay_ms=5)
            )
            count += 1
            if response.status_code != 200:
                failures.append(response.text)
        counts.append(count)

    with httpx.Client(base_url=stack.client.base_url, timeout=20) as session:
        threads = [threading.Thread(target=client, args=(session.post,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                wait_until(lambda: stack.in_flight("chat") > 0, "requests at the primary")
                stack.stubs["chat"].kill()
                stack.publish({"code": State.READY})
                stack.start_stub("chat")
                stack.publish(READY)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    assert failures == []
    assert sum(counts) > 100
