"""What servers say: their last words, and what Envoy tells about itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st

from llmsup.core.diagnosis import Ending, OomKills, diagnose
from llmsup.core.routing import Endpoint, Upstream
from llmsup.host import logfile
from llmsup.services import envoy_admin
from llmsup.services.envoy import cluster_name
from tests.fuzz.harness import JSON_TOKENS, fuzz, mutated, replaced

WORDS = (
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 1 MiB on device 0: ",
    "cudaMalloc failed: out of memory", "unable to allocate CUDA0 buffer",
    "gguf_init_from_file: ", "gguf_init_from_file", "No such file or directory",
    "failed to open GGUF file", "unknown model architecture: 'x'", "unknown model architecture: '",
    "error: invalid argument: --frob", "error while handling argument ", "0.00.006.124 E ",
    "couldn't bind HTTP server socket", "error while loading shared libraries: ", "0.0.0.0.0.0.0 ",
    " " * 400, "." * 400, "1" * 400, "\t", "\r", "\x1b[31m", "\x1b]0;", "\x1b", "\u202e", "\x00",
)  # fmt: skip
LINES = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=40)), max_size=6).map("".join)


@fuzz(
    "diagnosis",
    words=st.text(max_size=20),
    code=st.one_of(st.none(), st.integers(-1, 300)),
    signal=st.one_of(st.none(), st.integers(0, 70)),
    lines=st.lists(st.one_of(LINES, LINES.map(lambda line: line * 50)), max_size=80),
    oom_kills=st.builds(OomKills, st.integers(-1, 2), st.integers(-1, 2)),
)
def test_any_last_words_have_a_cause(
    words: str, code: int | None, signal: int | None, lines: list[str], oom_kills: OomKills
) -> None:
    found = diagnose(Ending(words, code, signal, lines, oom_kills))

    assert found.reason.startswith(words)
    assert len(found.reason) < len(words) + 300


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "chat.log"


LOGS = st.one_of(
    mutated([b"one\ntwo\r\nthree", b"0%\r50%\r100%\n"], [word.encode() for word in WORDS], 8),
    st.binary(max_size=300),
)


@fuzz("log lines", content=LOGS, offset=st.integers(0, 400), lines=st.integers(0, 5))
def test_any_output_is_shown_without_upsetting_a_terminal(
    log: Path, content: bytes, offset: int, lines: int
) -> None:
    log.write_bytes(content)
    for shown in (
        logfile.lines_between(log, offset, len(content), lines + 1, 1 << 20),
        logfile.tail(log, lines),
    ):
        assert len(shown) <= lines + 1
        for line in shown:
            assert len(line) <= logfile.LINE_MAX_CHARS
            assert not any(char < " " and char != "\t" for char in line)
            assert not any(
                "\x7f" <= char <= "\x9f" or "\u202a" <= char <= "\u202e" for char in line
            )


HOST = {
    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 8001}},
    "stats": [{"name": "rq_active", "value": "2", "type": "GAUGE"}, {"name": "cx_active"}],
    "health_status": {"eds_health_status": "HEALTHY"},
    "priority": 1,
}
CLUSTERS: dict[str, Any] = {
    "cluster_statuses": [
        {"name": cluster_name("chat-7b"), "host_statuses": [HOST, HOST]},
        {"name": "other", "added_via_api": True},
    ]
}
LISTS = {"chat-7b": (Upstream("chat", Endpoint("127.0.0.1", 8001), is_fallback=False),)}
SOCKET = Path("/run/activator.sock")


@example(body=b"[" * 100_000)
@example(body=b'{"cluster_statuses": ' * 100_000)
@fuzz(
    "Envoy's clusters",
    body=st.one_of(
        mutated([json.dumps(CLUSTERS).encode()], JSON_TOKENS),
        replaced(CLUSTERS).map(lambda answer: json.dumps(answer).encode()),
    ),
)
def test_any_answer_is_a_view_of_the_clusters_or_refused(body: bytes) -> None:
    try:
        found = envoy_admin.parse_clusters(body)
    except ValueError:
        return
    assert envoy_admin.has(found, "chat-7b", LISTS["chat-7b"], SOCKET) in {True, False}
    assert envoy_admin.requests_in_flight("chat", LISTS, found) is not None
    for seen in found.values():
        named = [it for it in seen if isinstance(it.host.endpoint, Endpoint)]
        assert len(envoy_admin.services(seen, LISTS.values())) == len(named)


@fuzz(
    "Envoy's counters",
    body=mutated([b"http.gateway.downstream_rq_active: 3\n", b"http.x: 1\n"], JSON_TOKENS),
)
def test_any_answer_is_a_number_of_requests_or_refused(body: bytes) -> None:
    try:
        found = envoy_admin.parse_requests_active(body)
    except ValueError:
        return
    assert isinstance(found, int)
