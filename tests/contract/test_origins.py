"""Web pages: which of them may ask, and what the others are told."""

import json
from collections.abc import Iterator

import pytest

from tests.contract.conftest import Stack, running
from tests.contract.test_routing_by_model import answered_by, is_error

ALLOWED = ("https://chat.example.com", "http://box.lan:3000")
REFUSED = [
    "https://evil.example",
    "http://evil.example:8000",
    "HTTPS://EVIL.EXAMPLE",
    "http://localhost.evil.example",
    "http://evil-localhost",
    "http://127.0.0.1.evil.example",
    "http://127.0.0.1@evil.example",
    "http://evil.example/http://localhost",
    "http://192.168.1.5:3000",
    "http://[::2]",
    "http://[::1].evil.example",
    "null",
    "https://chat.example.com.evil.example",
    "https://chat.example.com:444",
    "http://chat.example.com",
    "http://chatXexample.com",
]
WELCOME = [
    "http://localhost",
    "http://localhost:3000",
    "https://localhost:8443",
    "http://app.localhost:5173",
    "http://127.0.0.1:8000",
    "http://127.1.2.3",
    "http://[::1]:3000",
    "chrome-extension://abcdefghijklmnop",
    "moz-extension://a-b-c",
    "vscode-webview://1a2b3c",
    "app://obsidian.md",
    "tauri://localhost",
    "file://",
    *ALLOWED,
]


@pytest.fixture(scope="module")
def open_to_pages() -> Iterator[Stack]:
    """A stack whose profile allows two origins."""
    with running(allowed_origins=ALLOWED) as stack:
        yield stack


@pytest.mark.parametrize("origin", REFUSED)
def test_pages_of_strangers_are_refused(open_to_pages: Stack, origin: str) -> None:
    stub = open_to_pages.stubs["chat"]
    before = stub.requests("/v1/chat/completions")
    # What a page may send without asking first: a "simple" request, with any body.
    body = json.dumps({"model": "chat-7b", "messages": []})
    headers = {"origin": origin, "content-type": "text/plain"}

    response = open_to_pages.client.post("/v1/chat/completions", content=body, headers=headers)

    message = is_error(response, 403, "origin_not_allowed")
    assert "gateway.allowed_origins" in message
    assert not [name for name in response.headers if name.startswith("access-control-")]
    assert stub.requests("/v1/chat/completions") == before


@pytest.mark.parametrize("origin", WELCOME)
def test_pages_of_this_machine_and_programs_are_welcome(open_to_pages: Stack, origin: str) -> None:
    assert answered_by(open_to_pages.ask(headers={"origin": origin})) == "chat"


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "PUT"])
@pytest.mark.parametrize("path", ["/v1/models", "/slots", "/v1/chat/completions/control", "/"])
def test_no_path_is_open_to_strangers(stack: Stack, method: str, path: str) -> None:
    response = stack.client.request(method, path, headers={"origin": ALLOWED[0]})

    is_error(response, 403, "origin_not_allowed")


def test_a_preflight_of_strangers_gets_no_permission(stack: Stack) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}

    response = stack.client.options("/v1/chat/completions", headers=headers)

    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/health", "/llmsup/alive"])
def test_health_is_open_to_all(stack: Stack, path: str) -> None:
    assert stack.client.get(path, headers={"origin": "https://evil.example"}).status_code == 200
