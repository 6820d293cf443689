"""Requests that no upstream answers wait in the activator, and Envoy repeats them itself."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from llmsup import activator, models_api
from llmsup.activator import Activator
from llmsup.control import wire
from llmsup.control.server import serve
from llmsup.core.demand import Answer, Hold, Refuse, Repeat, Start
from llmsup.core.routing import Route
from llmsup.core.service import State
from llmsup.errors import LlmsupError
from tests.contract.conftest import ROUTES, Stack, running, wait_until
from tests.contract.test_failover import in_flight, services, stub


class Daemon:
    """The activator on a loop of its own, and what a daemon would say, said by the test."""

    def __init__(self, stack: Stack, hold_timeout_s: float) -> None:
        self.stack = stack
        self.answer: Answer = Start("chat")
        self.loads: list[str] = []
        self.asked: list[str] = []
        self._hold_timeout_s = hold_timeout_s
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._started.wait(10)

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        control = models_api.app(ROUTES, self)
        self.activator = Activator(ROUTES, self, self._hold_timeout_s, control)
        async with serve(self.activator, self.stack.layout.activator_socket):
            self._started.set()
            await self._end.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def say(self, answer: Answer) -> None:
        self.answer = answer
        self._loop.call_soon_threadsafe(self.activator.note_change)

    # --- what the activator asks

    def demand(self, route: Route) -> Answer:
        self.asked.append(route.name)
        return self.answer

    def note_waiting(self) -> None:
        pass

    def load(self, service: str) -> None:
        self.loads.append(service)
        self.answer = Hold()

    def start(self, services: tuple[str, ...]) -> wire.Answer:
        return wire.Answer(changed=list(services), message="")

    def stop(self, services: tuple[str, ...], *, now: bool) -> wire.Answer:
        raise LlmsupError("a new daemon takes over just now", hint="try again")

    def is_confirmed(self, route: str) -> bool:
        return True


@contextmanager
def daemon(stack: Stack, hold_timeout_s: float = 60) -> Iterator[Daemon]:
    made = Daemon(stack, hold_timeout_s)
    try:
        yield made
    finally:
        made.close()


def load(stack: Stack, daemon: Daemon) -> None:
    """The model is there: the list is written, then those who wait are told."""
    stack.publish({"chat": State.READY})
    daemon.say(Repeat())


@pytest.fixture
def cold(stack: Stack) -> Stack:
    """Both stubs are alive and in no list."""
    stack.publish({})
    return stack


def held(daemon: Daemon, count: int) -> None:
    wait_until(lambda: daemon.activator.held == count, f"{count} requests held")


def test_a_request_for_a_cold_model_waits_and_is_answered(cold: Stack) -> None:
    with daemon(cold) as it, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(cold.ask)
        held(it, 1)
        load(cold, it)

        answer = asking.result(20)

        assert answer.status_code == 200
        assert answer.headers["x-llmsup-service"] == "chat"
        assert "x-llmsup-retry" not in answer.headers
        assert it.loads == ["chat"]
        assert set(it.asked) == {"chat-7b"}


def test_the_activator_knows_routes_with_odd_names(cold: Stack) -> None:
    with daemon(cold) as it:
        it.answer = Refuse("chat is failed")
        for route in ROUTES:
            cold.ask(route.name)

        assert list(dict.fromkeys(it.asked)) == [route.name for route in ROUTES]


def test_a_server_is_not_told_of_routes(stack: Stack) -> None:
    headers = stack.ask(headers={"x-llmsup-route": "mine"}).json()["stub"]["headers"]

    assert not [name for name in headers if name.startswith("x-llmsup-")]


def test_many_requests_at_once_are_one_load_and_as_many_answers(cold: Stack) -> None:
    limits = httpx.Limits(max_connections=None)
    with (
        daemon(cold) as it,
        httpx.Client(base_url=cold.client.base_url, timeout=60, limits=limits) as client,
        ThreadPoolExecutor(200) as pool,
    ):
        futures = [
            pool.submit(client.post, "/v1/chat/completions", json={"model": "chat-7b"})
            for _ in range(200)
        ]
        held(it, 200)
        load(cold, it)

        assert services(futures) == {(200, "chat", "false")}
        assert it.loads == ["chat"]


def test_a_body_of_20_mb_survives_the_hold(cold: Stack) -> None:
    body = b'{"model": "chat-7b", "prompt": "' + b"abcdefghij" * 2_000_000 + b'"}'
    with daemon(cold) as it, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(cold.client.post, "/v1/completions", content=body)
        held(it, 1)
        load(cold, it)

        assert asking.result(20).json()["stub"]["sha256"] == hashlib.sha256(body).hexdigest()


def test_a_stream_is_held_and_then_arrives_event_by_event(cold: Stack) -> None:
    def ask() -> tuple[int, list[float]]:
        body = {"model": "chat-7b", "stream": True}
        headers = stub(events=5, interval_ms=60)
        with cold.client.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as answer:
            lines = [(line, time.monotonic()) for line in answer.iter_lines()]
        return answer.status_code, [at for line, at in lines if "chat-" in line]

    with daemon(cold) as it, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        held(it, 1)
        load(cold, it)

        status, arrivals = asking.result(20)

    assert status == 200
    assert len(arrivals) == 5
    assert arrivals[-1] - arrivals[0] > 0.1, "not all at once"


def test_a_client_that_goes_away_while_held_leaves_nothing_behind(cold: Stack) -> None:
    with daemon(cold) as it:
        client = httpx.Client(base_url=cold.client.base_url, timeout=0.5)
        with client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json={"model": "chat-7b"})

        held(it, 0)
        before = cold.stubs["chat"].requests("/v1/chat/completions")
        load(cold, it)
        assert cold.ask().status_code == 200
        assert cold.stubs["chat"].requests("/v1/chat/completions") == before + 1


def test_a_load_that_fails_is_a_503_that_says_why(cold: Stack) -> None:
    with daemon(cold) as it, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(cold.ask)
        held(it, 1)
        it.say(Refuse("chat is failed (no room)"))

        answer = asking.result(20)

    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "model_unavailable"
    assert "chat is failed (no room)" in answer.json()["error"]["message"]
    assert not [name for name in answer.headers if name.startswith("x-llmsup-")]


def test_who_waits_too_long_is_refused(cold: Stack) -> None:
    with daemon(cold, hold_timeout_s=0.2):
        answer = cold.ask()

    assert answer.status_code == 503
    assert "not ready within 200ms" in answer.json()["error"]["message"]


def test_requests_in_flight_at_a_kill_wait_for_the_only_server_to_be_back(stack: Stack) -> None:
    stack.publish({"chat": State.READY})
    with daemon(stack) as it:
        it.answer = Hold()
        with in_flight(stack, 20) as futures:
            stack.stubs["chat"].kill()
            held(it, 20)
            stack.publish({})
            stack.start_stub("chat")
            load(stack, it)

            assert services(futures) == {(200, "chat", "false")}


def test_a_death_that_the_daemon_has_not_seen_yet_is_waited_for(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given its word that the server is ready, the request would be given up after two tries."""
    monkeypatch.setattr(activator, "DEATH_TIMEOUT_S", 10)
    stack.publish({"chat": State.READY})
    with daemon(stack) as it, ThreadPoolExecutor(1) as pool:
        it.answer = Repeat()
        stack.stubs["chat"].kill()
        asking = pool.submit(stack.ask)
        held(it, 1)
        it.say(Hold())
        stack.publish({})
        stack.start_stub("chat")
        load(stack, it)

        assert asking.result(20).status_code == 200


def test_a_request_for_a_path_with_side_effects_is_held_too(cold: Stack) -> None:
    with daemon(cold) as it, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(cold.ask, "chat-7b", "/v1/responses")
        held(it, 1)
        load(cold, it)

        assert asking.result(20).status_code == 200


def test_a_server_that_never_answers_is_tried_as_often_as_without_the_activator(
    stack: Stack,
) -> None:
    path = "/v1/embeddings"
    before = [it.requests(path) for it in stack.stubs.values()]
    with daemon(stack) as it:
        it.answer = Repeat()

        answer = stack.ask(path=path, headers={"x-stub": json.dumps({"reset": True})})

    assert answer.status_code == 503
    after = [it.requests(path) for it in stack.stubs.values()]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1]


def test_without_a_daemon_the_gateway_refuses_by_itself(cold: Stack) -> None:
    answer = cold.ask()

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_unavailable"


# --- loading and unloading


@pytest.fixture(scope="module")
def guarded() -> Iterator[Stack]:
    """A gateway with an API key and an admin key."""
    with running(api_keys=("sk-1",), admin_keys=("sk-admin",)) as stack:
        yield stack


def control(stack: Stack, verb: str, key: str, **body: object) -> httpx.Response:
    return stack.client.post(f"/models/{verb}", json=body, headers={"x-api-key": key})


@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize("key", ["", "sk-1", "sk-2"])
def test_models_are_not_loaded_without_an_admin_key(guarded: Stack, verb: str, key: str) -> None:
    answer = control(guarded, verb, key, model="chat-7b")

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_where_there_are_no_admin_keys_there_is_nothing(stack: Stack, verb: str) -> None:
    assert control(stack, verb, "", model="chat-7b").status_code == 404


def test_with_an_admin_key_models_are_loaded_and_asked(guarded: Stack) -> None:
    with daemon(guarded):
        loaded = control(guarded, "load", "sk-admin", model="gpt-4o-mini")

    assert (loaded.status_code, loaded.json()) == (200, {"success": True})
    assert guarded.ask(headers={"x-api-key": "sk-admin"}).status_code == 200
    assert guarded.ask(headers={"x-api-key": "sk-1"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "nobody"}, 404, "known models: chat-7b, gpt-4o-mini"),
        ({"model": 1}, 400, "expected"),
        ({}, 400, "expected"),
        ({"model": "x" * 100_000}, 413, "larger than"),
    ],
)
def test_what_names_no_model_is_refused(
    guarded: Stack, body: dict[str, object], status: int, words: str
) -> None:
    with daemon(guarded):
        answer = control(guarded, "load", "sk-admin", **body)

    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_daemon_that_cannot_unload_just_now_says_so(guarded: Stack) -> None:
    with daemon(guarded):
        answer = control(guarded, "unload", "sk-admin", model="chat-7b")

    assert answer.status_code == 503
    assert "takes over just now" in answer.json()["error"]["message"]


def test_a_web_page_loads_no_models(guarded: Stack) -> None:
    headers = {"x-api-key": "sk-admin", "origin": "https://example.com"}
    answer = guarded.client.post("/models/load", json={"model": "chat-7b"}, headers=headers)

    assert answer.status_code == 403
