"""The process: sockets, keys, ports that are taken, and leaving."""

import json
import socket
import stat
from collections.abc import Iterator

import httpx
import pytest

from llmsup.core.routing import Route
from llmsup.core.service import State
from llmsup.host.ports import listened_to
from llmsup.services.envoy import ALIVE_PATH
from tests.contract.conftest import Stack, running, wait_until

KEYS = ("sk-alice", "sk-bob")


def test_admin_is_a_private_socket_and_not_on_tcp(stack: Stack) -> None:
    assert listened_to([stack.envoy.child.pid]) == {stack.port}
    sockets = [path for path in stack.layout.directory.iterdir() if path.is_socket()]
    assert stack.layout.admin_socket in sockets
    assert {stat.S_IMODE(path.stat().st_mode) for path in sockets} == {0o600}
    assert "ready" not in stack.client.get("/ready").text


def test_files_are_private(stack: Stack) -> None:
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in stack.layout.directory.rglob("*")
        if not path.is_socket()
    }
    assert set(modes.values()) == {0o600, 0o700}
    assert stat.S_IMODE(stack.layout.directory.stat().st_mode) == 0o700


def test_no_warning_at_start(private: Stack) -> None:
    private.gateway.prepare()
    private.start_envoy()

    said = private.log.read_text()

    assert "[critical]" not in said
    assert "[error]" not in said
    # The filter that checks keys is young; all else is as Envoy wants it.
    warnings = [line for line in said.splitlines() if "[warning]" in line]
    assert [line for line in warnings if "api_key_auth.v3.ApiKeyAuth" not in line] == []


def test_taken_port_leaves_a_live_process_that_does_not_serve(private: Stack) -> None:
    """Which is why a live process, or an answer on the port, is not enough to be ready."""
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        squatter.bind(("127.0.0.1", private.port))
        squatter.listen()
        private.gateway.prepare()
        process = private.spawn_envoy()
        wait_until(
            lambda: rejected_listeners(private) == 1 or not process.is_alive,
            "the listener is rejected",
        )

        assert process.is_alive
        assert private.port not in listened_to([process.child.pid])


def rejected_listeners(stack: Stack) -> int:
    told = stack.admin("/stats?filter=listener_manager.listener_create_failure")
    return int(told.rpartition(" ")[2] or 0)


def test_two_gateways_on_one_machine_leave_each_other_alone(stack: Stack, private: Stack) -> None:
    private.gateway.prepare()
    private.start_envoy()
    private.publish({"code": State.READY})

    assert stack.ask().headers["x-llmsup-service"] == "chat"
    assert private.ask().headers["x-llmsup-service"] == "code"


def test_second_gateway_on_the_port_of_the_first_takes_none_of_its_traffic(stack: Stack) -> None:
    other = Stack(port=stack.port)
    try:
        other.gateway.prepare()
        other.spawn_envoy()
        wait_until(lambda: rejected_listeners(other) == 1, "the second listener is rejected")

        for _ in range(20):
            assert httpx.get(f"http://127.0.0.1:{stack.port}/health").status_code == 200
            assert stack.ask().headers["x-llmsup-service"] == "chat"
    finally:
        other.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Stack]:
    """A stack that asks for a key."""
    with running(api_keys=KEYS) as stack:
        yield stack


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-alice"},
        {"authorization": "Bearer sk-bob"},
        {"x-api-key": "sk-alice"},
    ],
)
def test_key_opens_and_is_hidden_from_the_service(locked: Stack, headers: dict[str, str]) -> None:
    response = locked.ask(headers=headers)

    assert response.status_code == 200
    assert "sk-" not in json.dumps(response.json()["stub"]["headers"])
    assert locked.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sk-mallory"},
        {"authorization": "Bearer sk-alic"},
        {"authorization": "Bearer"},
        {"x-api-key": ""},
        {"x-llmsup-client": "alice"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/models/x", "/slots"])
def test_without_a_key_it_is_401(locked: Stack, path: str, headers: dict[str, str]) -> None:
    response = locked.ask(path=path, headers=headers)

    assert response.status_code == 401
    assert response.headers["content-type"] == "application/json"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"] == {
        "message": "The API key is missing or wrong.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


@pytest.mark.parametrize("second", ["sk-bob", "sk-mallory"])
def test_the_service_sees_neither_of_two_keys(locked: Stack, second: str) -> None:
    response = locked.ask(headers={"authorization": "Bearer sk-alice", "x-api-key": second})

    assert response.status_code == 200
    assert not {"authorization", "x-api-key"} & response.json()["stub"]["headers"].keys()


def test_a_second_key_does_not_make_up_for_a_wrong_first(locked: Stack) -> None:
    headers = {"authorization": "Bearer sk-mallory", "x-api-key": "sk-alice"}

    assert locked.ask(headers=headers).status_code == 401


def test_missing_and_wrong_keys_are_told_the_same(locked: Stack) -> None:
    """Byte by byte, whatever was asked: nothing is learned about keys, models or paths."""
    answers = set()
    for headers in ({}, {"x-api-key": "sk-mallory"}, {"authorization": "Bearer sk-alic"}):
        for path in ("/v1/chat/completions", "/v1/models", "/nowhere"):
            for model in ("chat-7b", "unknown"):
                response = locked.ask(model, path=path, headers=headers)
                told = {k: v for k, v in response.headers.items() if k != "date"}
                answers.add((response.status_code, str(sorted(told.items())), response.content))
    assert len(answers) == 1


def test_health_needs_no_key(locked: Stack) -> None:
    assert locked.client.get("/health").status_code == 200
    assert locked.client.get(ALIVE_PATH).status_code == 200


def test_many_models_fit_the_answers() -> None:
    """Envoy's default allows 4 KiB for an answer of its own."""
    aliases = tuple(f"model-with-a-long-name-{number}" for number in range(1000))
    stack = Stack(routes=(Route("chat-7b", ("chat",), aliases),))
    try:
        stack.gateway.prepare()
        stack.start_envoy()

        assert len(stack.client.get("/v1/models").json()["data"]) == 1001
        unknown = stack.ask("unknown")
        assert unknown.status_code == 404
        assert "chat-7b" in unknown.json()["error"]["message"]
        assert stack.ask(aliases[-1]).status_code == 503
    finally:
        stack.close()


def test_drain_closes_connections_after_their_answers(private: Stack) -> None:
    private.gateway.prepare()
    private.start_envoy()
    assert private.loop.run_until_complete(private.gateway.requests_active()) == 0

    private.loop.run_until_complete(private.gateway.drain_listeners())

    assert private.client.get("/health").headers["connection"] == "close"


def test_requests_active_counts_clients(stack: Stack) -> None:
    headers = {"x-stub": json.dumps({"events": 1000, "interval_ms": 10})}
    body = {"model": "chat-7b", "stream": True}
    with stack.client.stream("POST", "/v1/chat/completions", json=body, headers=headers):
        assert stack.loop.run_until_complete(stack.gateway.requests_active()) == 1
    wait_until(
        lambda: stack.loop.run_until_complete(stack.gateway.requests_active()) == 0,
        "the client has left",
    )
