"""The control API: the daemon's verbs as HTTP, for the clients of one Unix socket.

Every endpoint answers at once; what takes time is seen in `GET /status`. `POST /switch` answers
line by line until it has ended, and goes on where the client does not wait for that; where another
daemon ends it, `GET /switch` has the rest. An error is
`{"error": {"message", "hint", "exit_code"}}`. Who may connect may do everything: the socket is
0600. A request with an Origin comes from a browser through some proxy and changes nothing.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llmsup.control.wire import (
    Answer,
    ModelInfo,
    Status,
    SwitchProgress,
    SwitchResult,
    UpstreamsInfo,
)
from llmsup.errors import LlmsupError, UsageError

log = logging.getLogger(__name__)

BODY_MAX_BYTES = 1024 * 1024


class Stack(Protocol):
    """What the daemon does for its clients. Unknown services raise UsageError."""

    def status(self) -> Status:
        """The whole stack as it is now."""

    def upstreams(self) -> list[UpstreamsInfo]:
        """Every route's upstream lists."""

    def start(self, services: tuple[str, ...]) -> Answer:
        """Want these up; none: those that the profile starts."""

    def stop(self, services: tuple[str, ...], *, now: bool) -> Answer:
        """Want these down; none: all. `now` skips the drain."""

    def restart(self, services: tuple[str, ...], *, now: bool) -> Answer:
        """Want new processes of these; none: all that are wanted. `now` skips the drain."""

    async def models(self) -> list[ModelInfo]:
        """What each model server says it serves."""

    async def switch(
        self, target: str, model: str | None
    ) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """Have a service serve another model file or the profile's, or switch to another profile.

        Raises UsageError.
        """

    def follow_switch(self) -> AsyncIterator[SwitchProgress | SwitchResult]:
        """A switch to another profile that an earlier daemon began, or what came of it."""

    async def reload(self) -> Answer:
        """Have a new daemon bring about what the profile says now; raises ConfigError."""

    def hand_over(self) -> Answer:
        """Leave everything to a new daemon, which takes the place of this one."""

    def shut_down(self, *, now: bool) -> Answer:
        """End the stack and the daemon. `now` skips the drain."""


class AskBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /start`, `/stop` and `/restart`, as `wire.Ask`."""

    services: tuple[str, ...] = ()
    now: bool = False


class SwitchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /switch`, as `wire.SwitchAsk`."""

    target: str
    model: str | None = None


class ShutdownBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /shutdown`."""

    now: bool = False


class NoBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /reload` and `/handover`: empty."""


Body = TypeVar("Body", AskBody, SwitchBody, ShutdownBody, NoBody)
Endpoint = Callable[[Request], Awaitable[Response]]


def app(stack: Stack) -> Starlette:
    """The application that offers `stack`."""

    async def status(_request: Request) -> Response:
        return _json(stack.status())

    async def upstreams(_request: Request) -> Response:
        return _json(stack.upstreams())

    async def start(request: Request) -> Response:
        body = await _body(request, AskBody)
        return _json(stack.start(body.services))

    async def stop(request: Request) -> Response:
        body = await _body(request, AskBody)
        return _json(stack.stop(body.services, now=body.now))

    async def restart(request: Request) -> Response:
        body = await _body(request, AskBody)
        return _json(stack.restart(body.services, now=body.now))

    async def models(_request: Request) -> Response:
        return _json(await stack.models())

    async def switch(request: Request) -> Response:
        body = await _body(request, SwitchBody)
        return _told(await stack.switch(body.target, body.model))

    async def follow_switch(_request: Request) -> Response:
        return _told(stack.follow_switch())

    async def reload(request: Request) -> Response:
        await _body(request, NoBody)
        return _json(await stack.reload())

    async def hand_over(request: Request) -> Response:
        await _body(request, NoBody)
        return _json(stack.hand_over())

    async def shut_down(request: Request) -> Response:
        body = await _body(request, ShutdownBody)
        return _json(stack.shut_down(now=body.now))

    return Starlette(
        routes=[
            Route("/status", _guarded(status), methods=["GET"]),
            Route("/upstreams", _guarded(upstreams), methods=["GET"]),
            Route("/start", _guarded(start), methods=["POST"]),
            Route("/stop", _guarded(stop), methods=["POST"]),
            Route("/restart", _guarded(restart), methods=["POST"]),
            Route("/models", _guarded(models), methods=["GET"]),
            Route("/switch", _guarded(switch), methods=["POST"]),
            Route("/switch", _guarded(follow_switch), methods=["GET"]),
            Route("/reload", _guarded(reload), methods=["POST"]),
            Route("/handover", _guarded(hand_over), methods=["POST"]),
            Route("/shutdown", _guarded(shut_down), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refuse},
    )


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint with its errors as answers."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except UsageError as error:
            return _error(404, error.message, error.hint, error.exit_code)
        except LlmsupError as error:
            return _error(409, error.message, error.hint, error.exit_code)
        except HTTPException:
            raise
        except Exception as error:
            log.exception("%s %s broke", request.method, request.url.path)
            words = f"the daemon broke: {type(error).__name__}: {error}"
            hint = "its log has the details: llmsup logs daemon"
            return _error(500, words, hint, LlmsupError.exit_code)

    return guarded


async def _body(request: Request, kind: type[Body]) -> Body:
    """The decoded body; none at all is an empty one. Raises HTTPException."""
    if "origin" in request.headers:
        raise HTTPException(403, "requests from web pages are refused")
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > BODY_MAX_BYTES:
            raise HTTPException(413, f"the body is larger than {BODY_MAX_BYTES} bytes")
    try:
        return msgspec.json.decode(bytes(received) or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is not what is expected: {error}") from None


async def _refuse(_request: Request, error: Exception) -> Response:
    """An HTTPException as an answer: ours, and Starlette's 404 and 405."""
    if not isinstance(error, HTTPException):
        raise error
    return _error(error.status_code, str(error.detail), "", LlmsupError.exit_code)


def _told(lines: AsyncIterator[SwitchProgress | SwitchResult]) -> Response:
    encoded = (msgspec.json.encode(line) + b"\n" async for line in lines)
    return StreamingResponse(encoded, media_type="application/jsonl")


def _json(value: object, status_code: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code, media_type="application/json")


def _error(status_code: int, message: str, hint: str, exit_code: int) -> Response:
    error = {"message": message, "hint": hint, "exit_code": exit_code}
    return _json({"error": error}, status_code)
