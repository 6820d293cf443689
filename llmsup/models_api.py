"""`POST /models/load` and `/models/unload` of the gateway, as llama.cpp's router has them.

Envoy asks for an admin key, and sends them to the socket of the activator. Both answer at once.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path

from llmsup.control.wire import Answer
from llmsup.core.routing import Route
from llmsup.errors import LlmsupError
from llmsup.services.envoy_errors import error
from llmsup.services.envoy_routes import LOAD_PATH, UNLOAD_PATH

BODY_MAX_BYTES = 64 * 1024


class Stack(Protocol):
    """What the daemon does. Raises LlmsupError where it ends or is replaced."""

    def start(self, services: tuple[str, ...]) -> Answer:
        """Want these up."""

    def stop(self, services: tuple[str, ...], *, now: bool) -> Answer:
        """Want these down."""


class _Asked(msgspec.Struct, frozen=True):
    model: str


def app(routes: Sequence[Route], stack: Stack) -> Starlette:
    """The application. A model is loaded and unloaded in the first service of its route."""
    first = {name: route.services[0] for route in routes for name in route.names}

    def load(service: str) -> Response:
        is_changed = stack.start((service,))["changed"]
        return _done() if is_changed else _refused(400, "model is already running")

    def unload(service: str) -> Response:
        is_changed = stack.stop((service,), now=False)["changed"]
        return _done() if is_changed else _refused(400, "model is not running")

    return Starlette(
        routes=[
            Path(LOAD_PATH, _of_model(first, load), methods=["POST"]),
            Path(UNLOAD_PATH, _of_model(first, unload), methods=["POST"]),
        ]
    )


def _of_model(
    first: Mapping[str, str], act: Callable[[str], Response]
) -> Callable[[Request], Awaitable[Response]]:
    """Has `act` done with the service of the model that the body names."""

    async def endpoint(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_MAX_BYTES:
                return _refused(413, f"the body is larger than {BODY_MAX_BYTES} bytes")
        try:
            model = msgspec.json.decode(bytes(body), type=_Asked).model
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
            return _refused(400, f'expected {{"model": NAME}}: {problem}')
        if model not in first:
            known = ", ".join(first)
            return _refused(404, f"model is not found; known models: {known}", "model_not_found")
        try:
            return act(first[model])
        except LlmsupError as problem:
            return _refused(503, problem.message)

    return endpoint


def _done() -> Response:
    return JSONResponse({"success": True})


def _refused(status: int, message: str, code: str = "invalid_request") -> Response:
    return JSONResponse(error(message, code, param="model"), status)
