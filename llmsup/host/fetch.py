"""One small HTTP request over TCP or a Unix socket, for probes and Envoy's admin interface.

On bare sockets: a daemon that is idle does little else, and streams cost more than the question.
"""

import asyncio
import socket
from dataclasses import dataclass

import httptools

from llmsup.services.launch import Target

ANSWER_MAX_BYTES = 16 * 1024 * 1024
HEAD_MAX_BYTES = 64 * 1024
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Response:
    """Status and whole body of an answer, and whether the server closes the connection."""

    status: int
    body: bytes
    closes: bool


async def connect(target: Target) -> socket.socket:
    """A connection to the target's address. Raises OSError."""
    address: str | tuple[str, int]
    if target.unix_socket is not None:
        family, address = socket.AF_UNIX, str(target.unix_socket)
    else:
        family = socket.AF_INET6 if ":" in target.host else socket.AF_INET
        address = (target.host, target.port)
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


async def fetch(
    target: Target,
    *,
    timeout_s: float,
    method: str = "GET",
    body: bytes = b"",
    keep_alive: bool = False,
) -> Response:
    """Ask `target` once and read the answer to its end; `keep_alive`: as if to ask more.

    `body` is JSON.

    Raises TimeoutError after `timeout_s`, OSError where nothing listens or the connection breaks,
    and ValueError for a path that cannot be asked for and for an answer that is not HTTP or larger
    than `ANSWER_MAX_BYTES`.
    """
    request = _request(target, method, body, "keep-alive" if keep_alive else "close")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        with await connect(target) as connection:
            await loop.sock_sendall(connection, request)
            answer = _Answer()
            while not answer.is_complete:
                answer.feed(await loop.sock_recv(connection, _CHUNK_BYTES))
            return Response(answer.status, bytes(answer.body), answer.closes)


def _request(target: Target, method: str, body: bytes, connection: str) -> bytes:
    if not target.path.isascii() or not target.path.isprintable() or " " in target.path:
        raise ValueError(f"{target.path!r} cannot be asked for")
    host = "localhost" if target.unix_socket is not None else f"{target.host}:{target.port}"
    kind = "content-type: application/json\r\n" if body else ""
    head = (
        f"{method} {target.path} HTTP/1.1\r\nhost: {host}\r\n{kind}"
        f"content-length: {len(body)}\r\nconnection: {connection}\r\n\r\n"
    )
    return head.encode() + body


class _Answer:
    """An answer as its bytes come in. The `on_` methods are called by the parser."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()
        self.closes = False
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._received_bytes = 0
        self._has_head = False
        self._has_length = False

    def feed(self, data: bytes) -> None:
        """Take what was received; nothing at all is the end of the connection.

        Raises ValueError for what is no answer, ConnectionResetError where it ends too early.
        """
        if not data:
            if not self._has_head or self._has_length:
                raise ConnectionResetError("connection closed before the answer ended")
            self.is_complete = True
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.is_complete:  # what comes after the answer is nobody's concern
                raise ValueError(f"not HTTP: {error}") from None
        self._received_bytes += len(data)
        if not self._has_head and self._received_bytes > HEAD_MAX_BYTES:
            raise ValueError(f"not HTTP: headers larger than {HEAD_MAX_BYTES} bytes")
        if self._received_bytes > ANSWER_MAX_BYTES:
            raise ValueError(f"answer larger than {ANSWER_MAX_BYTES} bytes")

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in {b"content-length", b"transfer-encoding"}:
            self._has_length = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.closes = not self._parser.should_keep_alive()
        self._has_head = self.status >= 200  # after 1xx the answer is yet to come

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_complete = self._has_head
