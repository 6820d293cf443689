"""Closed-loop clients that ask for chat completions and keep a record of every request.

Each client has one keep-alive connection and sends its next request when the last was answered.
A request without an answer is one record with a status of 0 and the reason.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import h11

FAILURE_PAUSE_S = 0.005


@dataclass(frozen=True)
class Record:
    """One request: monotonic times in seconds, the status (0: no answer), and who answered.

    `retry_after` is what an answer advised of when to come again, empty where it did not.
    """

    sent_at: float
    answered_at: float
    status: int
    service: str
    is_fallback: bool
    error: str = ""
    body: bytes = b""
    retry_after: str = ""

    @property
    def wait_s(self) -> float:
        """Seconds from the first byte sent to the last one received."""
        return self.answered_at - self.sent_at

    @property
    def failed(self) -> bool:
        """Whether it was anything but answered."""
        return self.status != 200


def chat_body(model: str, *, max_tokens: int = 8, text: str = "Say hello.") -> bytes:
    """A chat completion request, the same answer each time."""
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
    ).encode()


class Client:
    """One keep-alive connection. `ask` never raises: a failure is a record, too."""

    def __init__(
        self, host: str, port: int, timeout_s: float = 120.0, api_key: str | None = None
    ) -> None:
        self._address = (host, port)
        self._timeout_s = timeout_s
        self._extra = [] if api_key is None else [("authorization", f"Bearer {api_key}")]
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes, path: str = "/v1/chat/completions") -> Record:
        """Post `body` and wait for the whole answer."""
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(body, path, sent_at)
        except (OSError, TimeoutError, h11.ProtocolError) as error:
            await self.close()
            reason = f"{type(error).__name__}: {error}"
            return Record(sent_at, time.monotonic(), 0, "", False, reason)

    async def close(self) -> None:
        """Drop the connection; the next `ask` makes a new one."""
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection; a new one where the server closed it since the last answer."""
        if self._streams is not None:
            reader, writer = self._streams
            if reader.at_eof() or reader.exception() is not None or writer.is_closing():
                await self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        return self._streams

    async def _exchange(self, body: bytes, path: str, sent_at: float) -> Record:
        reader, writer = await self._connected()
        http = h11.Connection(h11.CLIENT)
        head = h11.Request(
            method="POST",
            target=path,
            headers=[
                ("host", "localhost"),
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                *self._extra,
            ],
        )
        data = http.send(head) + http.send(h11.Data(body)) + http.send(h11.EndOfMessage())
        writer.write(data)
        await writer.drain()
        status, headers, answer = 0, {}, bytearray()
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                received = await reader.read(65536)
                http.receive_data(received)
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                answer += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("closed before the answer")
        if http.our_state is h11.MUST_CLOSE or headers.get("connection") == "close":
            await self.close()
        return Record(
            sent_at,
            time.monotonic(),
            status,
            headers.get("x-llmsup-service", ""),
            headers.get("x-llmsup-fallback") == "true",
            "" if status == 200 else answer.decode(errors="replace")[:200],
            bytes(answer),
            headers.get("retry-after", ""),
        )


@dataclass
class Load:
    """Clients in a closed loop against one address, from `start` to `finish`.

    Each pauses for `pause_s` after an answer, and for a moment after a failure: where connections
    are refused at once, a person's program would not spin either.
    """

    port: int
    body: bytes
    clients: int = 8
    host: str = "127.0.0.1"
    pause_s: float = 0.0
    timeout_s: float = 120.0
    api_key: str | None = None
    records: list[Record] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _is_finishing: bool = False

    def start(self) -> None:
        """Set the clients going on the running loop."""
        self._tasks = [asyncio.create_task(self._loop()) for _ in range(self.clients)]

    async def finish(self) -> Sequence[Record]:
        """Let the requests in flight end, then return all records."""
        self._is_finishing = True
        await asyncio.gather(*self._tasks)
        return self.records

    async def abandon(self) -> None:
        """End at once, whatever is in flight."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def within(self, start: float, end: float) -> list[Record]:
        """The records that overlap the time span."""
        return [r for r in self.records if r.sent_at < end and r.answered_at > start]

    async def _loop(self) -> None:
        client = Client(self.host, self.port, self.timeout_s, self.api_key)
        try:
            while not self._is_finishing:
                record = await client.ask(self.body)
                self.records.append(record)
                pause_s = max(self.pause_s, FAILURE_PAUSE_S) if record.failed else self.pause_s
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            await client.close()
