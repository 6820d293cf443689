"""Answers requests that no upstream answers: the last entry of every upstream list leads here.

The body is thrown away, for Envoy keeps it. The answer comes once a service of the route is ready:
a 503 that tells Envoy to repeat the request, which then goes there. Where none becomes ready, the
client gets the 503 that says why.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from llmsup.config.units import duration
from llmsup.core import demand
from llmsup.core.demand import Answer, Hold, Refuse, Repeat, Swap
from llmsup.core.routing import Route
from llmsup.services.envoy import cluster_name
from llmsup.services.envoy_clusters import ROUTE_HEADER
from llmsup.services.envoy_errors import RETRY_AFTER_S, error
from llmsup.services.envoy_routes import RETRY_HEADER

log = logging.getLogger(__name__)

CONFIRM_TIMEOUT_S = 1.0
"""How long Envoy is waited for to have the list with the service that became ready."""


DEATH_TIMEOUT_S = 0.25
"""How long the death of a service that is ready, but left a request, is waited for."""


class Stack(Protocol):
    """What the activator asks of the daemon."""

    def demand(self, route: Route) -> Answer:
        """What a request for the route gets now."""

    def load(self, service: str) -> None:
        """Want this service up, which starts on demand."""

    def note_waiting(self) -> None:
        """The first request waits for the turn of some service."""

    def is_confirmed(self, route: str) -> bool:
        """Whether Envoy has the list of the route as it is now."""


class Activator:
    """An ASGI application. Requests of all routes wait in it, up to `hold_timeout_s` each.

    `control` gets what Envoy sends here for itself, and not for want of an upstream.
    """

    def __init__(
        self, routes: Sequence[Route], stack: Stack, hold_timeout_s: float, control: ASGIApp
    ) -> None:
        self._routes = {cluster_name(route.name): route for route in routes}
        self._stack = stack
        self._control = control
        self._hold_timeout_s = hold_timeout_s
        self._changed = asyncio.Event()
        self._closing = ""
        self._is_handed_over = False
        self._waiting: dict[object, str] = {}
        self.held = 0

    @property
    def waited_for(self) -> tuple[str, ...]:
        """The services whose turn requests wait for, the one of the first request first."""
        return tuple(dict.fromkeys(self._waiting.values()))

    def note_change(self) -> None:
        """Have those who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self, why: str) -> None:
        """Refuse those who wait and those who come."""
        self._closing = why
        self.note_change()

    def hand_over(self) -> None:
        """Have Envoy repeat the requests that wait: they come to the next daemon."""
        self._is_handed_over = True
        self.note_change()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        name = headers.get(ROUTE_HEADER.encode())
        if name is None:
            await self._control(scope, receive, send)
            return
        route = self._routes.get(name.decode("latin-1"))
        if route is None:
            await _refuse(send, "The route of this request is not known any more.")
            return
        # By now, not after a long body: then it would only have become ready meanwhile.
        is_left = isinstance(self._look(route), Repeat) and self._stack.is_confirmed(route.name)
        while (await receive()).get("more_body"):
            pass
        gone = asyncio.ensure_future(receive())  # nothing else comes after the body
        held = asyncio.ensure_future(self._wait(route, is_left=is_left))
        self.held += 1
        try:
            await asyncio.wait({gone, held}, return_when=asyncio.FIRST_COMPLETED)
            if held.done():
                await _answer(send, held.result(), route)
        finally:
            self.held -= 1
            for task in (gone, held):
                task.cancel()

    async def _wait(self, route: Route, *, is_left: bool) -> Repeat | Refuse:
        """Until the request can be repeated or has to be refused.

        `is_left`: a service of its route was ready when it came here. That one did not answer, so
        it will be seen to have died, but may not have been yet.
        """
        if is_left:
            await self._wait_for_death(route)
        waiter = object()
        try:
            async with asyncio.timeout(self._hold_timeout_s):
                while isinstance(answer := self._look(route), Hold | Swap):
                    if isinstance(answer, Swap):
                        self._wait_for_turn(waiter, answer.service)
                    await self._changed.wait()
        except TimeoutError:
            return Refuse(f"not ready within {duration(self._hold_timeout_s)}")
        finally:
            self._waiting.pop(waiter, None)
        if isinstance(answer, Repeat) and not self._is_handed_over:
            await self._wait_confirmed(route)
        return answer

    def _wait_for_turn(self, waiter: object, service: str) -> None:
        is_first = service not in self._waiting.values()
        self._waiting[waiter] = service
        if is_first:
            self._stack.note_waiting()

    def _look(self, route: Route) -> Swap | Hold | Repeat | Refuse:
        if self._is_handed_over:
            return Repeat()
        if self._closing:
            return Refuse(self._closing)
        answer = self._stack.demand(route)
        while isinstance(answer, demand.Start):
            log.info("route=%s service=%s is loaded on demand", route.name, answer.service)
            self._stack.load(answer.service)
            answer = self._stack.demand(route)
        return answer

    async def _wait_for_death(self, route: Route) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(DEATH_TIMEOUT_S):
                while isinstance(self._look(route), Repeat) and not self._is_handed_over:
                    await self._changed.wait()

    async def _wait_confirmed(self, route: Route) -> None:
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                while not self._stack.is_confirmed(route.name):
                    await self._changed.wait()
        except TimeoutError:
            log.warning("route=%s Envoy is late with its list", route.name)


async def _answer(send: Send, answer: Repeat | Refuse, route: Route) -> None:
    if isinstance(answer, Repeat):
        # What a client sees of it where Envoy has no try left.
        await _refuse(send, f"The model '{route.name}' did not answer.", RETRY_HEADER)
    else:
        await _refuse(send, f"The model '{route.name}' is unavailable: {answer.why}.")


async def _refuse(send: Send, message: str, *headers: str) -> None:
    body = json.dumps(error(message, "model_unavailable", kind="server_error", param="model"))
    told = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("retry-after", str(RETRY_AFTER_S)),
        *((name, "1") for name in headers),
    ]
    raw = [(name.encode(), value.encode()) for name, value in told]
    await send({"type": "http.response.start", "status": 503, "headers": raw})
    await send({"type": "http.response.body", "body": body.encode()})
