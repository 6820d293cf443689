"""One small HTTP request over TCP or a Unix socket, for probes and Envoy's admin interface."""

import asyncio
from dataclasses import dataclass

import h11

from llmsup.services.launch import Target

BODY_MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Response:
    """Status and whole body of an answer, and whether the server closes the connection."""

    status: int
    body: bytes
    closes: bool


async def connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to the target's address. Raises OSError."""
    if target.unix_socket is not None:
        return await asyncio.open_unix_connection(target.unix_socket)
    return await asyncio.open_connection(target.host, target.port)


async def fetch(
    target: Target, *, timeout_s: float, method: str = "GET", keep_alive: bool = False
) -> Response:
    """Ask `target` once and read the answer to its end; `keep_alive`: as if to ask more.

    Raises TimeoutError after `timeout_s`, OSError where nothing listens or the connection breaks,
    and ValueError for an answer that is not HTTP or larger than `BODY_MAX_BYTES`.
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await connect(target)
        try:
            return await _exchange(reader, writer, target, method, keep_alive=keep_alive)
        except h11.RemoteProtocolError as error:
            raise ValueError(f"not HTTP: {error}") from None
        finally:
            writer.transport.abort()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    target: Target,
    method: str,
    *,
    keep_alive: bool,
) -> Response:
    connection = h11.Connection(h11.CLIENT)
    host = "localhost" if target.unix_socket is not None else f"{target.host}:{target.port}"
    request = h11.Request(
        method=method,
        target=target.path,
        headers=[
            ("host", host),
            ("content-length", "0"),
            ("connection", "keep-alive" if keep_alive else "close"),
        ],
    )
    writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
    await writer.drain()
    status, closes = 0, False
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            status = event.status_code
            closes = (b"connection", b"close") in event.headers
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_MAX_BYTES:
                raise ValueError(f"answer larger than {BODY_MAX_BYTES} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return Response(status, bytes(body), closes)
        elif isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError("connection closed before the answer ended")
