"""What can be read without calling a tool: the stack, and what happened last."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from anyio import to_thread

from llmsup.config.paths import Paths
from llmsup.control.client import Client
from llmsup.mcp import command

EVENTS = 50


@dataclass(frozen=True)
class Resource:
    """A document with an address."""

    uri: str
    name: str
    description: str
    read: Callable[[Paths], Awaitable[Any]]


async def _status(home: Paths) -> Any:
    return await to_thread.run_sync(Client(home).status, abandon_on_cancel=True)


async def _events(_home: Paths) -> Any:
    return (await command.run("events", "--json", "-n", str(EVENTS))).json_lines()


RESOURCES = (
    Resource("llmsup://status", "status", "The stack, as get_status has it.", _status),
    Resource(
        "llmsup://events",
        "events",
        f"The last {EVENTS} state changes and what was published to the gateway, oldest first. "
        "It is there with no daemon, too.",
        _events,
    ),
)
