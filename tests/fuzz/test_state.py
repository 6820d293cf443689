"""What a daemon left behind: its memory, its lists, and its events."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example
from hypothesis import strategies as st

from llmsup.cli import events
from llmsup.cli.render import event as rendered
from llmsup.cli.render import subject
from llmsup.core.routing import Endpoint, Upstream
from llmsup.host import memory, procfs
from llmsup.host.memory import Memory, Remembered
from llmsup.services.envoy_clusters import parse_upstreams, upstreams
from tests.fuzz.harness import JSON_TOKENS, copied, fuzz, mutated, replaced

PROFILE = "/home/me/dual.toml"
REMEMBERED = Memory(
    procfs.boot_id(),
    PROFILE,
    {"chat": Remembered("down", 3, 2, (1.5, 2.5), 8001), "code": Remembered("", 1, 0)},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "memory.json"


def saved(content: Any) -> bytes:
    """A file whose checksum is right, whatever is in it."""
    inner = json.dumps(content).encode()
    told = {"version": memory.VERSION, "sha256": hashlib.sha256(inner).hexdigest()}
    return json.dumps(told).encode()[:-1] + b', "memory": ' + inner + b"}"


GOOD = saved(msgspec.to_builtins(REMEMBERED))


@fuzz(
    "state file",
    content=st.one_of(
        mutated([GOOD], JSON_TOKENS),
        replaced(msgspec.to_builtins(REMEMBERED)).map(saved),
        st.binary(max_size=100),
    ),
)
def test_any_state_file_is_remembered_or_set_aside(path: Path, content: bytes) -> None:
    aside = path.with_suffix(".corrupt")
    aside.unlink(missing_ok=True)
    path.write_bytes(content)
    found = memory.load(path, PROFILE)
    assert path.exists() != aside.exists()
    if found.services:
        memory.save(path, found)
        assert memory.load(path, PROFILE) == found


LIST = (
    Upstream("chat", Endpoint("127.0.0.1", 8001), is_fallback=False),
    Upstream("code", Endpoint("127.0.0.1", 8004), is_fallback=True, is_draining=True),
)
DOCUMENT = upstreams("chat-7b", LIST, Path("/run/activator.sock"))


BAD_HOST: Any = copied(DOCUMENT)
SOCKET = BAD_HOST["resources"][0]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
SOCKET["socket_address"]["address"] = []


@example(content=json.dumps(BAD_HOST).encode())
@example(content=b"[" * 100_000)
@fuzz(
    "upstream lists",
    content=st.one_of(
        mutated([json.dumps(DOCUMENT).encode()], JSON_TOKENS),
        replaced(DOCUMENT).map(lambda document: json.dumps(document).encode()),
    ),
)
def test_any_upstream_list_is_read_or_refused(content: bytes) -> None:
    try:
        found = parse_upstreams(content)
    except ValueError:
        return
    assert len(set(found)) <= len(found), "what is read can be compared"
    for one in found:
        assert isinstance(one.service, str)
        assert isinstance(one.endpoint.host, str)
        assert 0 < one.endpoint.port < 65536


EVENTS: list[dict[str, Any]] = [
    {"time": 1.7e9, "at_s": 5.0, "event": "daemon", "why": "stopping"},
    {"time": 1.7e9, "at_s": 5.0, "event": "state", "service": "chat", "generation": 1,
     "state": "ready", "before": "starting", "want": "up", "why": ""},
    {"time": 1.7e9, "at_s": 5.0, "event": "published", "route": "r", "upstreams": ["chat"]},
    {"time": 1.7e9, "at_s": 5.0, "event": "confirmed", "route": "r", "upstreams": ["chat"],
     "elapsed_ms": 1.25},
]  # fmt: skip
LINES = [json.dumps(event).encode() for event in EVENTS]


@example(content=json.dumps(EVENTS[2] | {"upstreams": ["\x1f"]}).encode())
@example(content=json.dumps(EVENTS[1] | {"service": "\x1b[31m"}).encode())
@example(content=json.dumps(EVENTS[0] | {"time": "now"}).encode())
@example(content=json.dumps(EVENTS[0] | {"time": 1e300}).encode())
@example(content=json.dumps(EVENTS[3] | {"elapsed_ms": "1"}).encode())
@example(content=b"[" * 100_000)
@fuzz(
    "event lines",
    content=st.one_of(
        mutated([*LINES, b"\n".join(LINES)], JSON_TOKENS),
        st.sampled_from(EVENTS).flatmap(replaced).map(lambda event: json.dumps(event).encode()),
    ),
)
def test_any_event_line_is_shown_or_passed_over(path: Path, content: bytes) -> None:
    file = path.with_name("events.jsonl")
    file.write_bytes(content)
    for info in events.read(file, 100):
        shown = rendered(info, width=len(subject(info)))
        assert shown.isprintable()
        assert len(shown) < 20_000
    os.truncate(file, 0)
