import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llmsup.core.health import Outcome, ProbeResult
from llmsup.host.probe import probe
from llmsup.services.launch import Target, Via

PASSED = ProbeResult(Outcome.PASSED)


def http(status: str, body: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


@asynccontextmanager
async def answering(
    answer: bytes | None, unix_socket: Path | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """A server that sends `answer` to whoever asks and hangs up; None: it never says a word."""

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if answer is None:
                await reader.read()
            else:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    if unix_socket is not None:
        server = await asyncio.start_unix_server(attend, unix_socket)
    else:
        server = await asyncio.start_server(attend, host, 0)
    async with server:
        yield 0 if unix_socket is not None else server.sockets[0].getsockname()[1]


def probed(answer: bytes | None, *, via: Via = Via.HTTP, timeout_s: float = 5.0) -> ProbeResult:
    async def scenario() -> ProbeResult:
        async with answering(answer) as port:
            result = await probe(Target(via, port=port, path="/health"), timeout_s)
            return ProbeResult(result.outcome, result.reason.replace(str(port), "PORT"))

    return asyncio.run(scenario())


def failed(reason: str) -> ProbeResult:
    return ProbeResult(Outcome.FAILED, reason)


def unwell(reason: str) -> ProbeResult:
    return ProbeResult(Outcome.UNWELL, reason)


@pytest.mark.parametrize("status", ["200 OK", "204 No Content"])
def test_success_passes(status: str) -> None:
    assert probed(http(status)) == PASSED


def test_loading_is_told_from_failing() -> None:
    body = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'

    assert probed(http("503 Service Unavailable", body)) == ProbeResult(
        Outcome.LOADING, "loading its model"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"busy",
        b"[]",
        b'{"error":"Loading model"}',
        b'{"error":{"message":"full"}}',
        b"[" * 99999,
    ],
)
def test_any_other_503_is_unwell(body: bytes) -> None:
    assert probed(http("503 Service Unavailable", body)) == unwell("answered 503")


@pytest.mark.parametrize("status", [301, 404, 500])
def test_other_statuses_are_unwell(status: int) -> None:
    assert probed(http(f"{status} Whatever")) == unwell(f"answered {status}")


def test_silence_fails_in_time() -> None:
    silent = ProbeResult(Outcome.SILENT, "no answer within 50ms")
    assert probed(None, timeout_s=0.05) == silent


def test_hanging_up_fails() -> None:
    result = probed(b"")

    assert result.outcome is Outcome.FAILED
    assert result.reason.startswith(("127.0.0.1:PORT: ", "connection"))


def test_what_is_not_http_fails() -> None:
    result = probed(b"220 mail.example ESMTP\r\n\r\n")

    assert result.outcome is Outcome.FAILED
    assert result.reason.startswith("127.0.0.1:PORT: not HTTP")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\nuntil the connection ends",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        http("200 OK", b"ok") + b"and what nobody asked for",
    ],
)
def test_an_answer_may_end_in_many_ways(answer: bytes) -> None:
    assert probed(answer) == PASSED


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ntoo short",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\nhalf-a-head",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_half_an_answer_fails(answer: bytes) -> None:
    assert probed(answer) == failed("127.0.0.1:PORT: connection closed before the answer ended")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * 1_000_000, "not HTTP: headers larger than 65536 bytes"),
        (http("200 OK", b"x" * 17_000_000), "answer larger than 16777216 bytes"),
    ],
)
def test_an_answer_without_end_fails(answer: bytes, reason: str) -> None:
    assert probed(answer) == failed(f"127.0.0.1:PORT: {reason}")


@pytest.mark.parametrize("via", [Via.HTTP, Via.TCP])
def test_a_shortage_of_our_own_says_nothing_of_the_service(via: Via) -> None:
    async def scenario() -> ProbeResult:
        async with answering(http("200 OK")) as port:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                return await probe(Target(via, port=port), 5.0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert asyncio.run(scenario()) == ProbeResult(
        Outcome.UNKNOWN, "this daemon: Too many open files"
    )


@pytest.mark.parametrize("via", [Via.HTTP, Via.TCP])
def test_refusal_names_the_address(via: Via) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        result = asyncio.run(probe(Target(via, port=port), 5.0))

    assert result == failed(f"connection refused on 127.0.0.1:{port}")


def test_a_connection_is_enough_for_tcp() -> None:
    assert probed(None, via=Via.TCP) == PASSED


def test_alive_is_not_asked() -> None:
    assert asyncio.run(probe(Target(Via.ALIVE), 5.0)) == PASSED


@pytest.mark.parametrize("via", [Via.HTTP, Via.TCP])
def test_ipv6_is_asked(via: Via) -> None:
    async def scenario() -> ProbeResult:
        async with answering(http("200 OK"), host="::1") as port:
            return await probe(Target(via, host="::1", port=port), 5.0)

    assert asyncio.run(scenario()) == PASSED


def test_unix_socket_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def scenario() -> None:
        target = Target(Via.HTTP, unix_socket=path)
        assert await probe(target, 5.0) == failed(f"no socket at {path}")
        async with answering(http("200 OK"), path):
            assert await probe(target, 5.0) == PASSED

    asyncio.run(scenario())


def test_a_path_that_cannot_be_asked_for_fails() -> None:
    async def scenario() -> ProbeResult:
        async with answering(http("200 OK")) as port:
            return await probe(Target(Via.HTTP, port=port, path="/a b"), 5.0)

    assert asyncio.run(scenario()).outcome is Outcome.FAILED
