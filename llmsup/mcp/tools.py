"""The tools: what each takes, what it promises, and what it does.

What a daemon does is asked of it over the control socket; what works with no daemon is a verb of
the command line (`command`). Nothing here knows the SDK.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import to_thread
from msgspec import Struct

from llmsup.config.paths import Paths
from llmsup.control.client import Client
from llmsup.control.wire import Status, SwitchProgress
from llmsup.errors import LlmsupError
from llmsup.mcp import arguments, command, replies
from llmsup.mcp.current import current

Document = Mapping[str, Any]
JSON_OPTION = "--json"


@dataclass(frozen=True)
class Call:
    """One call: whose home, what was given, and who is told how a switch gets on.

    `tell` is called from another thread.
    """

    home: Paths
    given: Any
    tell: Callable[[SwitchProgress], None]


@dataclass(frozen=True)
class Reply:
    """A document, and whether it tells of an error."""

    document: Document
    is_error: bool = False


@dataclass(frozen=True)
class Tool:
    """A tool; the last three are the hints of the protocol that bear their names.

    `replies`: what it answers, unless it refuses.
    """

    name: str
    description: str
    arguments: type[Struct]
    replies: tuple[Any, ...]
    act: Callable[[Call], Awaitable[Reply]]
    is_read_only: bool = True
    is_destructive: bool = False
    is_idempotent: bool = True


def refusal(error: LlmsupError) -> replies.Refusal:
    """An error as a document: one line, and what to do."""
    return {"error": one_line(error.message), "hint": one_line(error.hint)}


def one_line(text: str) -> str:
    """What was said in several lines, in one."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


async def _ask(act: Callable[[], Any]) -> Any:
    """Ask the daemon. A caller that gives up is not kept waiting for its answer."""
    return await to_thread.run_sync(act, abandon_on_cancel=True)


async def _get_current_model(call: Call) -> Reply:
    client = Client(call.home)
    models = await _ask(client.models)
    return Reply(current(await _ask(client.status), models))


async def _switch_model(call: Call) -> Reply:
    """The keys are there whatever went wrong: scripts read `success`."""
    given: arguments.Switch = call.given
    switch = partial(Client(call.home).switch, given.model_type, given.model, call.tell)
    try:
        result = await _ask(switch)
    except LlmsupError as error:
        failed: replies.Switched = {
            "success": False,
            "message": one_line(error.message),
            "current_model": None,
            "switch_time_seconds": 0.0,
            "hint": one_line(error.hint),
        }
        return Reply(failed, is_error=True)
    document: replies.Switched = {
        "success": result["success"],
        "message": one_line(result["message"]),
        "current_model": result["current_model"],
        "switch_time_seconds": round(result["switch_time_s"], 3),
        "service": result["service"],
        "profile": result["profile"],
    }
    if not result["success"]:
        whose = result["service"] or "a service"
        document["hint"] = f"the tool why tells of {whose}; get_status shows all"
    return Reply(document, is_error=not result["success"])


async def _get_status(call: Call) -> Reply:
    return Reply(await _ask(Client(call.home).status))


async def _list_profiles(call: Call) -> Reply:
    profiles = (await command.run("profile", "list", JSON_OPTION)).json()
    try:
        up = (await _ask(Client(call.home).status))["daemon"]["profile"]
    except LlmsupError:
        up = None
    found: replies.Profiles = {"profiles": profiles, "up": up}
    return Reply(found)


async def _plan(call: Call) -> Reply:
    given: arguments.Plan = call.given
    argv = [f"--set={text}" for text in given.overrides]
    if given.total_mib is not None:
        argv.append(f"--total={given.total_mib}")
    if given.free_mib is not None:
        argv.append(f"--free={given.free_mib}")
    source = [] if given.profile is None else [given.profile]
    said = await command.run("plan", JSON_OPTION, *argv, "--", *source)
    notes = {"refusal": said.error, "hint": said.hint, "notes": one_line(said.words)}
    document = {**said.json(), **{name: text for name, text in notes.items() if text}}
    return Reply(document | ({"fits": False} if said.error else {}))


async def _why(call: Call) -> Reply:
    given: arguments.Why = call.given
    said = await command.run("why", JSON_OPTION, "-n", str(given.last), "--", given.service)
    return Reply(said.json())


async def _restart_service(call: Call) -> Reply:
    given: arguments.Restart = call.given
    said = await command.run("restart", "--", given.service)
    if said.status != 0:
        raise LlmsupError(said.error or said.words or "it said nothing", hint=said.hint)
    status: Status = await _ask(Client(call.home).status)
    info = next(each for each in status["services"] if each["service"] == given.service)
    restarted: replies.Restarted = {
        "success": True,
        "message": f"{given.service} is {info['state']} (generation {info['generation']})",
        "service": info["service"],
        "state": info["state"],
        "pid": info["pid"],
        "generation": info["generation"],
        "why": info["why"],
    }
    return Reply(restarted)


async def _drill(call: Call) -> Reply:
    given: arguments.Drill = call.given
    said = await command.run("drill", JSON_OPTION, "--", *given.scenarios)
    found = said.json()
    keys = replies.Drilled.__annotations__
    scenarios: list[Any] = [
        {key: each[key] for key in keys if key in each} for each in found["scenarios"]
    ]
    drill: replies.Drill = {
        "passed": found["passed"],
        "profile": found["profile"]["name"],
        "route": found["traffic"]["route"],
        "scenarios": scenarios,
        "message": one_line(said.words),
    }
    return Reply(drill)


TOOLS = (
    Tool(
        "get_current_model",
        "Which models serve now, as their servers say themselves. phase is dual (chat_model, "
        "code_model, service_chat, service_code) or single (current_model, model_type, service). "
        "A model is null while it loads.",
        arguments.Nothing,
        (replies.Dual, replies.Single),
        _get_current_model,
    ),
    Tool(
        "switch_model",
        "Have a service serve the model that its profile expects, or a GGUF file, and wait until "
        "it answers. In single mode the service becomes the one active one. Where that fails, what "
        "served before serves again. Loading takes seconds to minutes.",
        arguments.Switch,
        (replies.Switched,),
        _switch_model,
        is_read_only=False,
    ),
    Tool(
        "get_status",
        "The stack: daemon, graphics card, every service with its state and the reason for it, "
        "and every route with the services that answer it.",
        arguments.Nothing,
        (Status,),
        _get_status,
    ),
    Tool(
        "list_profiles",
        "The profiles that there are, and which one is up (null: none).",
        arguments.Nothing,
        (replies.Profiles,),
        _list_profiles,
    ),
    Tool(
        "plan",
        "Who would get what of the graphics card, and why, without starting anything. fits is "
        "false where it cannot work; then refusal says why.",
        arguments.Plan,
        (replies.Plan,),
        _plan,
    ),
    Tool(
        "why",
        "How a service is, and why it died the last times: cause, last output, what followed.",
        arguments.Why,
        (replies.Why,),
        _why,
    ),
    Tool(
        "restart_service",
        "Give a service a new process, once its requests have ended, and wait until it is ready.",
        arguments.Restart,
        (replies.Restarted,),
        _restart_service,
        is_read_only=False,
        is_destructive=True,
        is_idempotent=False,
    ),
    Tool(
        "drill",
        "Break the running stack on purpose under light traffic, mend it again, and tell what "
        "requests felt. Takes up to minutes. Ask the person before.",
        arguments.Drill,
        (replies.Drill,),
        _drill,
        is_read_only=False,
        is_destructive=True,
        is_idempotent=False,
    ),
)


async def call_tool(
    tool: Tool, home: Paths, given: Document, tell: Callable[[SwitchProgress], None]
) -> Reply:
    """Call it. An error that llmsup knows is a reply."""
    try:
        parsed = arguments.parse(given, tool.arguments)
        return await tool.act(Call(home, parsed, tell))
    except LlmsupError as error:
        return _refused(tool, error)
    except Exception as error:  # the session goes on
        words = f"unexpected {type(error).__name__}: {error}"
        return _refused(tool, LlmsupError(words, hint="this is a bug in llmsup"))


def _refused(tool: Tool, error: LlmsupError) -> Reply:
    document = refusal(error)
    document["hint"] = document["hint"] or arguments.known(tool.arguments)
    if not tool.is_read_only:  # scripts read it, whatever went wrong
        document["success"] = False
        document["message"] = document["error"]
    return Reply(document, is_error=True)
