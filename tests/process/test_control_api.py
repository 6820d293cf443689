"""The control API over a real Unix socket: the real client, and clients that misbehave."""

import http.client
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsup.control.api import BODY_MAX_BYTES
from llmsup.control.client import Client, daemon_is_alive, wait_gone
from llmsup.errors import LlmsupError, NotRunningError, UnknownStateError, UsageError
from tests.fake_daemon import FakeStack, held, service, serving
from tests.home import Home


@pytest.fixture
def stack(home: Home) -> Iterator[FakeStack]:
    fake = FakeStack(service("chat"), service("code"))
    with serving(home.paths, fake):
        yield fake


class Raw(http.client.HTTPConnection):
    """Says to the socket whatever it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self.path))


def post(
    home: Home, path: str, body: bytes, headers: dict[str, str] | None = None, verb: str = "POST"
) -> tuple[int, Any]:
    connection = Raw(home.paths.control_socket)
    try:
        connection.request(verb, path, body, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_verbs_reach_the_stack(home: Home, stack: FakeStack) -> None:
    client = Client(home.paths)

    assert client.status() == stack.snapshot
    assert [info["route"] for info in client.upstreams()] == ["chat-7b"]
    assert client.start(["chat"]) == {"changed": ["chat"], "message": "start"}
    client.stop(["chat", "code"], now=True)
    client.restart()
    assert stack.asked == [
        ("start", ("chat",), False),
        ("stop", ("chat", "code"), True),
        ("restart", (), False),
    ]


def test_an_unknown_service_is_a_usage_error_with_the_known_ones(
    home: Home, stack: FakeStack
) -> None:
    with pytest.raises(UsageError, match="unknown service: chta") as caught:
        Client(home.paths).stop(["chta"])

    assert caught.value.hint == "known services: chat, code"


def test_what_the_stack_refuses_and_where_it_breaks(home: Home, stack: FakeStack) -> None:
    stack.is_broken = True

    with pytest.raises(LlmsupError, match="not now") as refused:
        Client(home.paths).restart()
    with pytest.raises(LlmsupError, match="the daemon broke: RuntimeError: no status") as broke:
        Client(home.paths).status()
    assert (refused.value.hint, refused.value.exit_code) == ("later", 1)
    assert "llmsup logs daemon" in broke.value.hint


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_socket_is_private_whatever_the_umask(home: Home, umask: int) -> None:
    home.paths.create()
    before = os.umask(umask)
    try:
        with serving(home.paths, FakeStack()):
            mode = stat.S_IMODE(home.paths.control_socket.stat().st_mode)
            during = os.umask(umask)
    finally:
        os.umask(before)

    assert (mode, during) == (0o600, umask)


def test_a_stale_socket_is_replaced_and_ours_removed_at_the_end(home: Home) -> None:
    home.paths.create()
    for name in ("control.sock", "control.new"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(home.paths.runtime / name))

    with serving(home.paths, FakeStack(service("chat"))):
        assert Client(home.paths).status()["services"]

    assert [path.name for path in home.paths.runtime.iterdir()] == []


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/stop", b"{", (400, "truncated")),
        ("/stop", b"[]", (400, "Expected `object`")),
        ("/stop", b'{"services": "chat"}', (400, "Expected `array`")),
        ("/stop", b'{"services": [1]}', (400, "Expected `str`")),
        ("/stop", b'{"now": 1}', (400, "Expected `bool`")),
        ("/restart", b'{"nwo": true}', (400, "unknown field `nwo`")),
        ("/shutdown", b'{"services": []}', (400, "unknown field `services`")),
        ("/start", b'"\xff"', (400, "not what is expected")),
        ("/start", b" " * (BODY_MAX_BYTES + 1), (413, "larger than")),
        ("/nowhere", b"", (404, "Not Found")),
        ("/status", b"", (405, "Method Not Allowed")),
    ],
)
def test_bad_requests_change_nothing(
    home: Home, stack: FakeStack, path: str, body: bytes, expected: tuple[int, str]
) -> None:
    status, answer = post(home, path, body)

    assert status == expected[0]
    assert expected[1] in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert stack.asked == []


@pytest.mark.parametrize("path", ["/start", "/stop", "/restart", "/shutdown"])
def test_web_pages_change_nothing(home: Home, stack: FakeStack, path: str) -> None:
    status, answer = post(home, path, b"{}", {"Origin": "http://evil.example"})

    assert (status, stack.asked) == (403, [])
    assert "web pages" in answer["error"]["message"]


def test_an_empty_body_asks_for_everything(home: Home, stack: FakeStack) -> None:
    assert post(home, "/start", b"")[0] == 200
    assert stack.asked == [("start", (), False)]


def test_shutting_down_answers_and_then_the_daemon_is_gone(home: Home, stack: FakeStack) -> None:
    client = Client(home.paths)
    assert daemon_is_alive(home.paths) == 123

    assert client.shut_down(now=True)["message"] == "shut_down"

    assert wait_gone(home.paths, timeout_s=10)
    assert daemon_is_alive(home.paths) is None
    assert stack.asked == [("shut_down", (), True)]
    with pytest.raises(NotRunningError):
        client.status()


def test_clients_that_hang_do_not_delay_the_end(home: Home, stack: FakeStack) -> None:
    """Given a request that never ends, a shutdown is over within the grace of the server."""
    connection = Raw(home.paths.control_socket)
    connection.connect()
    connection.sock.sendall(b"POST /stop HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")

    Client(home.paths).shut_down()

    assert wait_gone(home.paths, timeout_s=10)
    connection.close()


# --- a daemon that is not there, or cannot be understood


def test_nothing_there_is_not_running(home: Home) -> None:
    with pytest.raises(NotRunningError) as caught:
        Client(home.paths).status()

    assert caught.value.hint == "llmsup start"
    assert wait_gone(home.paths, timeout_s=0)


def test_a_socket_that_nobody_listens_on_is_not_running(home: Home) -> None:
    home.paths.create()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(home.paths.control_socket))

    with pytest.raises(NotRunningError):
        Client(home.paths).status()


def test_a_held_lock_without_a_socket_is_a_daemon_in_between(home: Home) -> None:
    home.paths.create()
    with held(home.paths.lock):
        with pytest.raises(UnknownStateError, match=r"pid 123\) is starting or stopping"):
            Client(home.paths).status()
        assert not wait_gone(home.paths, timeout_s=0)


def test_a_daemon_that_hangs_is_unknown(home: Home) -> None:
    home.paths.create()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(home.paths.control_socket))
        mute.listen()

        with pytest.raises(UnknownStateError, match=r"did not answer within 0\.05 s"):
            Client(home.paths, timeout_s=0.05).status()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
        b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
        b"",
    ],
)
def test_garbage_is_unknown(home: Home, answer: bytes) -> None:
    home.paths.create()
    with socket.socket(socket.AF_UNIX) as strange:
        strange.bind(str(home.paths.control_socket))
        strange.listen()

        def serve_once() -> None:
            connection, _ = strange.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_once)
        thread.start()
        try:
            with pytest.raises(UnknownStateError) as caught:
                Client(home.paths).status()
        finally:
            thread.join(10)

    assert caught.value.exit_code == 4
    assert caught.value.hint
