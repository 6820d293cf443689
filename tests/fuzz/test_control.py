"""What is asked of the daemon over its control socket."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st

from llmsup.control.api import app
from tests.fake_daemon import FakeStack, service
from tests.fuzz.harness import JSON_TOKENS, fuzz, mutated, replaced

PATHS = (
    "/start",
    "/stop",
    "/restart",
    "/handover",
    "/shutdown",
    "/status",
    "/upstreams",
    "/models",
    "/switch",
    "/x",
    "/",
)
ASK = {"services": ["chat", "code"], "now": True}
SWITCH = {"target": "chat", "model": "b.gguf"}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@fuzz(
    "control API",
    method=st.sampled_from(["POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "X"]),
    path=st.one_of(st.sampled_from(PATHS), st.sampled_from(PATHS).map(lambda path: f"/%00{path}")),
    headers=st.dictionaries(
        st.sampled_from(["origin", "content-type", "content-length", "transfer-encoding", "host"]),
        st.sampled_from(["", "null", "http://evil", "application/json", "7", "-1", "chunked"]),
        max_size=2,
    ),
    body=st.one_of(
        mutated([json.dumps(ASK).encode(), json.dumps(SWITCH).encode(), b"{}"], JSON_TOKENS),
        replaced(ASK).map(lambda ask: json.dumps(ask).encode()),
    ),
)
def test_any_request_is_done_or_refused(
    runner: asyncio.Runner, method: str, path: str, headers: dict[str, str], body: bytes
) -> None:
    stack = FakeStack(service("chat"), service("code"))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app(stack), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://llmsup") as client:
            return await client.request(method, path, headers=headers, content=body)

    answer = runner.run(ask())
    assert answer.status_code < 500, answer.text
    if method != "HEAD":
        is_lines = "jsonl" in answer.headers.get("content-type", "")
        told: Any = None if is_lines else answer.json()
        if answer.status_code != 200:
            assert told["error"]["message"]
    is_done = bool(stack.asked)
    assert is_done == (answer.status_code == 200 and method == "POST")
    assert not (is_done and "origin" in headers), "no web page changes anything"
