"""A stub of an OpenAI-compatible model server, for tests and benchmarks. Standard library only.

    python tests/stubs/upstream.py --port 8001 --name chat [--delay-ms 20] [--load-s 1.5]

Every inference path answers JSON that names the stub and echoes what was received (path, headers,
body length and SHA-256). `"stream": true` in the body answers server-sent events, paced. A request
header `x-stub` with a JSON object changes one answer:

    delay_ms, events, interval_ms     as the options of the same names
    status                            answer this status instead of 200
    headers                           extra response headers
    reset                             drop the connection instead of answering
    busy_s                            compute for so long first, on a whole core
    raw                               write this text as the whole answer
    close                             drop the connection after the answer
    prefill_ms                        the time between a stream's headers and its first event

It can stand in for a llama-server, whose other flags it ignores. `/slots` and `/metrics` tell of
the requests it answers, but nothing while one is computed; what its slot holds is in slots.py.
After `POST /stub/wedge` it says that it is healthy and decodes nothing any more; after
`POST /stub/deafen` it does not tell so either,
and after `POST /stub/mute` it answers nothing at all.

`GET /health` says 503 "Loading model" for the first `--load-s` seconds, as llama-server does, and
so does every other path. `GET /stub` tells what happened so far: requests by path.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from slots import Slot  # type: ignore[import-not-found]  # it is beside this file

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
BUFFER_BYTES = 4 * 1024 * 1024


@dataclass
class Stub:
    """What all connections share. `ready_at` is monotonic seconds."""

    name: str
    delay_ms: float
    events: int
    interval_ms: float
    ready_at: float
    slot: Slot
    model: str = ""
    status: int = 200
    requests: Counter[str] = field(default_factory=Counter)
    processing: int = 0
    decoded: int = 0
    is_wedged: bool = False
    is_deaf: bool = False
    is_mute: bool = False
    computing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, path, _version = first.split(" ", 2)
    pairs = (line.split(":", 1) for line in lines)
    headers = {key.strip().lower(): value.strip() for key, value in pairs}
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = await read_chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    path, _, query = path.partition("?")
    return Request(method, path, query, headers, body)


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return bytes(body)


async def serve(stub: Stub, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection until the client leaves."""
    with contextlib.suppress(OSError, EOFError):
        while await answer(stub, await read_request(reader, writer), writer):
            await writer.drain()
    writer.transport.abort()


async def answer(stub: Stub, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Answer one request. Returns whether the connection may be used again."""
    if request.path == "/stub":
        write_json(writer, 200, {"name": stub.name, "requests": stub.requests})
        return True
    if request.path in {"/stub/wedge", "/stub/deafen", "/stub/mute"}:
        stub.is_wedged = True
        stub.is_deaf = request.path == "/stub/deafen"
        stub.is_mute = request.path == "/stub/mute"
        write_json(writer, 200, {"name": stub.name})
        return True
    if stub.is_mute:
        await asyncio.Event().wait()
    if time.monotonic() < stub.ready_at:
        write_json(writer, 503, LOADING)
        return True
    about = {"/health": {"status": "ok"}, "/props": {"model_path": stub.model}}
    if request.path in about:
        write_json(writer, 200, about[request.path])
        return True
    if request.path in {"/slots", "/metrics", "/slots/0"} or stub.slot.is_tried(request.body):
        await tell_work(stub, request, writer)
        return True
    stub.requests[request.path] += 1
    stub.processing += 1
    try:
        return await infer(stub, request, writer)
    finally:
        stub.processing -= 1


async def tell_work(stub: Stub, request: Request, writer: asyncio.StreamWriter) -> None:
    """As llama-server does, whose decoding loop answers these; it has one slot."""
    if stub.is_deaf:
        await asyncio.Event().wait()
    if request.path not in {"/slots", "/metrics"}:
        write_json(writer, *await stub.slot.answer(request.path, request.query, request.body))
        return
    async with stub.computing:
        slot = {"id": 0, "is_processing": stub.processing > 0, "n_decoded": stub.decoded}
        slot["n_prompt_tokens"] = len(stub.slot.tokens)
        if request.path == "/slots":
            write_json(writer, 200, [slot])
            return
        metrics = {
            "n_decode_total": stub.decoded,
            "requests_processing": min(stub.processing, 1),
            "requests_deferred": max(stub.processing - 1, 0),
        }
        write_text(writer, "".join(f"llamacpp:{name} {n}\n" for name, n in metrics.items()))


def burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


async def infer(stub: Stub, request: Request, writer: asyncio.StreamWriter) -> bool:
    """Answer one inference request. Returns whether the connection may be used again."""
    wish: dict[str, Any] = json.loads(request.headers.get("x-stub", "{}"))
    if stub.is_wedged:
        await asyncio.Event().wait()
    if busy_s := wish.get("busy_s", 0):
        async with stub.computing:
            await asyncio.to_thread(burn, busy_s)
    stub.decoded += 1
    stub.slot.tokens = list(request.body)
    if (delay_ms := wish.get("delay_ms", stub.delay_ms)) > 0:
        await asyncio.sleep(delay_ms / 1000)
    if wish.get("reset"):
        return False
    if "raw" in wish:
        writer.write(wish["raw"].encode("latin-1"))
        await writer.drain()
    elif wants_stream(request.body):
        await write_events(stub, writer, wish)
    else:
        status = wish.get("status", stub.status)
        body = error(status) if status >= 400 else completion(stub, request)
        write_json(writer, status, body, wish.get("headers", {}))
    return not wish.get("close")


def wants_stream(body: bytes) -> bool:
    if b'"stream"' not in body:
        return False
    with contextlib.suppress(ValueError):
        asked = json.loads(body)
        return isinstance(asked, dict) and asked.get("stream") is True
    return False


def error(status: int) -> dict[str, Any]:
    return {"error": {"message": f"stub says {status}", "type": "stub_error", "code": status}}


def completion(stub: Stub, request: Request) -> dict[str, Any]:
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 0,
        "model": stub.name,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": f"This is {stub.name}."},
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
        "stub": {
            "name": stub.name,
            "model": stub.model,
            "method": request.method,
            "path": request.path,
            "headers": request.headers,
            "bytes": len(request.body),
            "sha256": hashlib.sha256(request.body).hexdigest(),
        },
    }


def event(stub: Stub, delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {
        "id": "chatcmpl-stub",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": stub.name,
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def write_events(stub: Stub, writer: asyncio.StreamWriter, wish: dict[str, Any]) -> None:
    """Headers at once, as llama-server sends them, then one event every `interval_ms`."""
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    await asyncio.sleep(wish.get("prefill_ms", 0) / 1000)
    for number in range(wish.get("events", stub.events)):
        await asyncio.sleep(wish.get("interval_ms", stub.interval_ms) / 1000)
        write_chunk(writer, event(stub, {"content": f"{stub.name}-{number} "}, None))
        await writer.drain()
    write_chunk(writer, event(stub, {}, "stop"))
    write_chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


def write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def write_json(
    writer: asyncio.StreamWriter, status: int, body: object, headers: dict[str, str] | None = None
) -> None:
    extra = "".join(f"{key}: {value}\r\n" for key, value in (headers or {}).items())
    write_answer(writer, status, "application/json", json.dumps(body).encode(), extra)


def write_text(writer: asyncio.StreamWriter, text: str) -> None:
    write_answer(writer, 200, "text/plain", text.encode())


def write_answer(
    writer: asyncio.StreamWriter, status: int, kind: str, data: bytes, extra: str = ""
) -> None:
    head = (
        f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n"
        f"content-type: {kind}\r\ncontent-length: {len(data)}\r\n{extra}\r\n"
    )
    writer.write(head.encode() + data)


async def main(arguments: argparse.Namespace) -> None:
    stub = Stub(
        name=arguments.name,
        delay_ms=arguments.delay_ms,
        events=arguments.events,
        interval_ms=arguments.interval_ms,
        ready_at=time.monotonic() + arguments.load_s,
        slot=Slot(arguments.slot_save_path),
        model=arguments.model,
        status=arguments.status,
    )
    server = await asyncio.start_server(
        lambda reader, writer: serve(stub, reader, writer),
        arguments.host,
        arguments.port,
        limit=BUFFER_BYTES,
        backlog=socket.SOMAXCONN,
        reuse_port=arguments.reuse_port,
    )
    async with server:
        await server.serve_forever()


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A stub of an OpenAI-compatible model server.", allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", "--alias", default="stub")
    parser.add_argument("--reuse-port", action="store_true", help="SO_REUSEPORT, as llama-server")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before every answer")
    parser.add_argument("--load-s", type=float, default=0.0, help="say 503 for so long at first")
    parser.add_argument("--model", default="", help="the file that /props tells of")
    parser.add_argument("--slot-save-path", default="", help="a directory for its slot")
    parser.add_argument("--status", type=int, default=200, help="of every answer")
    parser.add_argument("--events", type=int, default=8, help="tokens of a stream")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="between two of them")
    return parser


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(options().parse_known_args()[0]))
