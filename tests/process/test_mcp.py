"""`llmsup mcp`, driven by the SDK's own client, over a real daemon with stub servers."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client.session import ClientSession
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, TextContent, TextResourceContents, Tool

from llmsup.control.wire import SwitchProgress, SwitchResult
from tests.cards import StubCards
from tests.fake_daemon import FakeStack, service, serving
from tests.home import LLMSUP, Home, is_alive, wait_until
from tests.process.test_card_plan import set_free
from tests.process.test_drill import is_stopped
from tests.process.test_stack import dual
from tests.process.test_switch import another, stack

HINTS = {
    "get_current_model": (True, False, True),
    "switch_model": (False, False, True),
    "get_status": (True, False, True),
    "list_profiles": (True, False, True),
    "plan": (True, False, True),
    "why": (True, False, True),
    "restart_service": (False, True, False),
    "drill": (False, True, False),
}
"""By tool: readOnlyHint, destructiveHint, idempotentHint."""
NAME = {"type": "string", "minLength": 1, "maxLength": 200}
MAYBE_NAME = {"anyOf": [NAME, {"type": "null"}], "default": None}
PROPERTIES: dict[str, dict[str, Any]] = {
    "get_current_model": {},
    "switch_model": {"model_type": NAME, "model": MAYBE_NAME},
    "get_status": {},
    "list_profiles": {},
    "plan": {
        "profile": MAYBE_NAME,
        "total_mib": {},
        "free_mib": {},
        "overrides": {"type": "array", "items": NAME, "default": []},
    },
    "why": {"service": NAME, "last": {"type": "integer", "minimum": 1, "default": 3}},
    "restart_service": {"service": NAME},
    "drill": {"scenarios": {"type": "array", "items": NAME, "default": []}},
}


REQUIRED = {
    "get_current_model": [
        {"phase", "chat_model", "code_model", "service_chat", "service_code", "profile"},
        {"phase", "current_model", "model_type", "service", "profile"},
    ],
    "switch_model": [{"success", "message", "current_model", "switch_time_seconds"}],
    "get_status": [{"daemon", "gpu", "services", "routes"}],
    "list_profiles": [{"profiles", "up"}],
    "plan": [{"device", "fits", "services", "left_bytes"}],
    "why": [{"service", "present", "deaths"}],
    "restart_service": [{"success", "message", "service", "state", "pid", "generation"}],
    "drill": [{"passed", "profile", "route", "scenarios"}],
}
"""By tool: keys that each kind of its answers has; an error is one more kind."""


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    set_free(stub, 5900)
    home.environ |= stub.environ
    return stub


@asynccontextmanager
async def connected(home: Home) -> AsyncIterator[ClientSession]:
    server = StdioServerParameters(
        command=LLMSUP, args=["mcp"], env=home.environ, cwd=str(home.root)
    )
    with (home.root / "mcp.log").open("w") as words:
        async with (
            stdio_client(server, errlog=words) as (received, sent),
            ClientSession(received, sent, read_timeout_seconds=60) as session,
        ):
            await session.initialize()
            yield session


def talk(home: Home, act: Callable[[ClientSession], Awaitable[None]]) -> None:
    """One session; what the server said besides the protocol is nothing."""

    async def whole() -> None:
        async with connected(home) as session:
            await act(session)

    anyio.run(whole)
    assert (home.root / "mcp.log").read_text() == ""


async def good(session: ClientSession, tool: str, **given: object) -> dict[str, Any]:
    """The document of an answer; the client has checked it by the schema of the tool."""
    result = await session.call_tool(tool, given)
    assert not result.is_error, result
    assert result.structured_content == json.loads(text_of(result))
    return dict(result.structured_content or {})


async def bad(session: ClientSession, tool: str, **given: object) -> dict[str, Any]:
    """The document of an error: a line, and what to do."""
    result = await session.call_tool(tool, given)
    assert result.is_error, result
    await session.validate_tool_result(tool, result)  # some clients do, of an error too
    document = dict(result.structured_content or {})
    words, told = document.get("error") or document["message"], text_of(result)
    assert told.startswith(words) or json.loads(told) == document
    assert "\n" not in words
    assert document["hint"], document
    return document


def schema_of(tool: Tool) -> dict[str, Any]:
    """That of its answers, with what it refers to put in one level deep."""
    schema = dict(tool.output_schema or {})
    assert schema["type"] == "object", "clients take no other"
    names = [each["$ref"].removeprefix("#/$defs/") for each in schema["anyOf"]]
    return {**schema, "anyOf": [schema["$defs"][name] for name in names]}


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def resource(session: ClientSession, uri: str) -> Any:
    (content,) = (await session.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    return json.loads(content.text)


def test_tools_are_listed_with_schemas_and_hints(home: Home) -> None:
    async def session(client: ClientSession) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        hints = {
            name: (each.read_only_hint, each.destructive_hint, each.idempotent_hint)
            for name, tool in tools.items()
            if (each := tool.annotations)
        }
        assert hints == HINTS
        for name, tool in tools.items():
            schema = tool.input_schema
            assert (schema["type"], schema["additionalProperties"]) == ("object", False)
            assert tool.description
            assert schema["properties"].keys() == PROPERTIES[name].keys()
            for key, expected in PROPERTIES[name].items():
                found = schema["properties"][key]
                assert found["description"]
                assert expected.items() <= found.items(), (name, key)
            answers = schema_of(tool)["anyOf"]
            required = [set(each["required"]) for each in answers]
            assert required.pop() == {"error", "hint"}
            assert len(required) == len(REQUIRED[name])
            for found, expected in zip(required, REQUIRED[name], strict=True):
                assert expected <= found, name
        listed = (await client.list_resources()).resources
        assert [str(each.uri) for each in listed] == ["llmsup://status", "llmsup://events"]

    talk(home, session)


def test_dual_models_are_told_switched_and_told_again(home: Home, cards: StubCards) -> None:
    stack(home)
    following = another(home, "next")

    async def session(client: ClientSession) -> None:
        before = await good(client, "get_current_model")
        assert (before["phase"], before["profile"], before["service_chat"]) == (
            "dual", "test", "chat",
        )  # fmt: skip
        assert before["chat_model"] == before["code_model"]

        seen: list[str | None] = []

        async def note(progress: float, total: float | None, message: str | None) -> None:
            seen.append(message)

        arguments = {"model_type": "chat", "model": str(following)}
        result = await client.call_tool("switch_model", arguments, progress_callback=note)
        switched = dict(result.structured_content or {})
        assert (switched["success"], switched["current_model"]) == (True, "next.gguf"), switched
        assert switched["switch_time_seconds"] > 0
        assert switched["message"]
        assert any(message and message.startswith("chat: ") for message in seen)

        assert (await good(client, "get_current_model"))["chat_model"] == "next.gguf"
        again = await good(client, "switch_model", model_type="code")
        assert (again["success"], again["current_model"]) == (True, before["code_model"])

    talk(home, session)


def test_single_mode_is_told_and_switched(home: Home, cards: StubCards) -> None:
    stack(home, mode="single")

    async def session(client: ClientSession) -> None:
        before = await good(client, "get_current_model")
        assert (before["phase"], before["model_type"], before["service"]) == (
            "single", "chat", "chat",
        )  # fmt: skip
        assert before["current_model"].endswith(".gguf")
        assert (await good(client, "switch_model", model_type="code"))["success"] is True
        after = await good(client, "get_current_model")
        assert (after["phase"], after["model_type"]) == ("single", "code")

    talk(home, session)


def test_a_switch_that_cannot_be_says_so_with_the_usual_keys(home: Home, cards: StubCards) -> None:
    stack(home)
    dying = another(home, "dies")

    async def session(client: ClientSession) -> None:
        for given in (
            {"model_type": "poetry"},
            {"model_type": "chat", "model": "/nowhere/at-all.gguf"},
            {"model_type": "chat", "model": str(dying)},
        ):
            refused = await bad(client, "switch_model", **given)
            assert refused["success"] is False
            assert {"message", "current_model", "switch_time_seconds"} <= refused.keys()
        now = await good(client, "get_current_model")
        assert (now["phase"], now["chat_model"]) == ("dual", now["code_model"])

    talk(home, session)


def test_plans_that_fit_and_that_do_not_are_answers(home: Home, cards: StubCards) -> None:
    stack(home)

    async def session(client: ClientSession) -> None:
        planned = await good(client, "plan")
        assert planned["fits"] is True
        assert {each["service"] for each in planned["services"]} == {"chat", "code"}
        too_small = await good(
            client, "plan", total_mib=1, overrides=["service.chat.gpu_layers=all"]
        )
        assert too_small["fits"] is False
        assert too_small["refusal"]
        gone = await good(client, "plan", overrides=["service.code.model=gone.gguf"])
        assert (gone["fits"], "gone.gguf" in gone["refusal"]) == (False, True)

    talk(home, session)


def test_deaths_are_told_as_they_are_kept(home: Home) -> None:
    dual(home)
    home.start()
    before = home.service("chat")
    os.kill(before["pid"], signal.SIGKILL)
    home.wait_replaced(before)
    wait_until(lambda: any(home.paths.crashes.rglob("death.json")), "the death is kept")

    async def session(client: ClientSession) -> None:
        told = await good(client, "why", service="chat")
        assert [each["generation"] for each in told["deaths"]] == [before["generation"]]
        assert "SIGKILL" in told["deaths"][0]["reason"]

    talk(home, session)


def test_every_other_tool_and_resource_answers(home: Home) -> None:
    dual(home)
    home.start()
    # What lies where the client works is nobody's module.
    (home.root / "json.py").write_text("raise SystemExit('imported from the working directory')\n")

    async def session(client: ClientSession) -> None:
        status = await good(client, "get_status")
        assert {"daemon", "gpu", "services", "routes"} <= status.keys()
        profiles = await good(client, "list_profiles")
        assert profiles["up"] == "test"
        assert {"dual", "single", "demo"} <= {each["name"] for each in profiles["profiles"]}
        planned = await good(client, "plan", total_mib=6141)
        assert (planned["fits"], planned["services"]) == (True, [])
        before = home.service("chat")
        restarted = await good(client, "restart_service", service="chat")
        assert (restarted["success"], restarted["state"]) == (True, "ready")
        assert restarted["generation"] > before["generation"]
        told = await good(client, "why", service="chat", last=1)
        assert (told["service"], told["present"]["state"]) == ("chat", "ready")
        drilled = await good(client, "drill", scenarios=["load"])
        assert drilled["passed"] is True
        assert [each["scenario"] for each in drilled["scenarios"]] == ["load"]

        assert (await resource(client, "llmsup://status"))["daemon"]["profile"] == "test"
        events = await resource(client, "llmsup://events")
        assert any(each.get("service") == "chat" for each in events)

    talk(home, session)


def test_bad_input_is_an_error_and_the_session_goes_on(home: Home) -> None:
    dual(home)
    home.start()

    async def session(client: ClientSession) -> None:
        for tool, given, words in (
            ("get_current_model", {"service": "chat"}, "service"),
            ("get_status", {"verbose": True}, "verbose"),
            ("list_profiles", {"all": True}, "all"),
            ("switch_model", {}, "model_type"),
            ("switch_model", {"model_type": ["chat"]}, "model_type"),
            ("switch_model", {"model_type": "c" * 201}, "model_type"),
            ("switch_model", {"model_type": "chat", "model": ""}, "model"),
            ("switch_model", {"model_type": "chat", "force": True}, "force"),
            ("switch_model", {"model_type": "chat"}, "chat"),
            ("why", {"service": "poetry"}, "poetry"),
            ("why", {}, "service"),
            ("why", {"service": "--help"}, "--help"),
            ("why", {"service": "chat", "last": 99}, "last"),
            ("why", {"service": "chat", "last": "3"}, "last"),
            ("restart_service", {}, "service"),
            ("restart_service", {"service": "poetry"}, "poetry"),
            ("restart_service", {"service": 7}, "service"),
            ("restart_service", {"service": "--daemon"}, "--daemon"),
            ("drill", {"scenarios": "kill"}, "scenarios"),
            ("drill", {"scenarios": ["--out=/"]}, "--out=/"),
            ("drill", {"scenarios": ["earthquake"]}, "earthquake"),
            ("plan", {"profile": "--verbose"}, "--verbose"),
            ("plan", {"profile": "no-such-profile"}, "no-such-profile"),
            ("plan", {"overrides": ["nonsense"]}, "nonsense"),
            ("plan", {"total_mib": "much"}, "total_mib"),
            ("plan", {"total_mib": 0}, "total_mib"),
        ):
            document = await bad(client, tool, **given)
            assert words in document.get("error", "") + document.get("message", ""), document
            assert HINTS[tool][0] or document["success"] is False
        with pytest.raises(MCPError, match="unknown tool: rm"):
            await client.call_tool("rm", {})
        with pytest.raises(MCPError, match="unknown resource"):
            await client.read_resource("llmsup://secrets")
        assert (await good(client, "get_status"))["daemon"]["profile"] == "test"

    talk(home, session)


def test_without_a_daemon_each_tool_says_what_to_do(home: Home) -> None:
    async def session(client: ClientSession) -> None:
        for tool, given in (
            ("get_current_model", {}),
            ("get_status", {}),
            ("restart_service", {"service": "chat"}),
            ("drill", {}),
            ("switch_model", {"model_type": "chat"}),
        ):
            document = await bad(client, tool, **given)
            assert document["hint"] == "llmsup start", document
        assert (await bad(client, "why", service="chat"))["error"] == "unknown service: chat"
        assert (await good(client, "list_profiles"))["up"] is None
        assert await resource(client, "llmsup://events") == []
        with pytest.raises(MCPError, match="not running"):
            await client.read_resource("llmsup://status")

    talk(home, session)


def test_a_daemon_that_ends_between_two_calls_is_noticed(home: Home) -> None:
    dual(home)
    home.start()

    async def session(client: ClientSession) -> None:
        await good(client, "get_status")
        assert (await anyio.to_thread.run_sync(home.cli, "stop")).returncode == 0
        assert (await bad(client, "get_status"))["error"] == "llmsup is not running"

    talk(home, session)


def test_a_daemon_that_hangs_is_not_waited_for(home: Home) -> None:
    dual(home)
    home.start()
    pid = home.daemon_pid()
    assert pid is not None

    async def session(client: ClientSession) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            for tool, given in (
                ("get_current_model", {}),
                ("switch_model", {"model_type": "chat"}),
            ):
                document = await bad(client, tool, **given)
                words = document.get("error") or document["message"]
                assert "did not answer" in words
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await good(client, "get_status"))["daemon"]["pid"] == pid

    talk(home, session)


def test_a_daemon_that_is_killed_in_the_middle_of_a_switch_is_an_error(
    home: Home, cards: StubCards
) -> None:
    stack(home)
    following = another(home, "next")
    pid = home.daemon_pid()
    assert pid is not None

    async def session(client: ClientSession) -> None:
        async def kill(progress: float, total: float | None, message: str | None) -> None:
            os.kill(pid, signal.SIGKILL)

        given: dict[str, Any] = {"model_type": "chat", "model": str(following)}
        result = await client.call_tool("switch_model", given, progress_callback=kill)
        assert result.is_error
        assert (result.structured_content or {})["success"] is False
        wait_until(lambda: not is_alive(pid), "the daemon is gone")
        assert (await bad(client, "get_status"))["hint"] == "llmsup start"

    talk(home, session)


@contextmanager
def served(home: Home) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        [LLMSUP, "mcp"],
        env=home.environ, cwd=home.root,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def test_it_ends_when_its_client_goes(home: Home) -> None:
    with served(home) as running:
        out, words = running.communicate(b"this is no JSON\n", timeout=30)

    assert (running.returncode, words) == (0, b"")
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in out.splitlines())


class Endless(FakeStack):
    """Its switches go on until it is shut."""

    async def switch(
        self, target: str, model: str | None
    ) -> AsyncIterator[SwitchProgress | SwitchResult]:
        async def lines() -> AsyncIterator[SwitchProgress | SwitchResult]:
            while not self.shut.is_set():
                yield {
                    "phase": "loading",
                    "service": target,
                    "model": "large.gguf",
                    "elapsed_s": 1.0,
                    "read_bytes": 0,
                    "size_bytes": 0,
                    "last_load_s": None,
                    "why": "",
                }
                await asyncio.sleep(0.1)

        return lines()


def line(method: str, **fields: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, **fields}).encode() + b"\n"


def opening() -> bytes:
    about = {"name": "test", "version": "1"}
    params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": about}
    return line("initialize", id=1, params=params) + line("notifications/initialized")


def test_it_ends_when_its_client_goes_in_the_middle_of_a_switch(home: Home) -> None:
    arguments = {"model_type": "chat"}
    params = {"name": "switch_model", "arguments": arguments, "_meta": {"progressToken": 7}}
    with serving(home.paths, Endless(service("chat"))), served(home) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(opening() + line("tools/call", id=2, params=params))
        running.stdin.flush()
        while b"notifications/progress" not in running.stdout.readline():
            assert running.poll() is None
        _, words = running.communicate(timeout=30)

    assert (running.returncode, words) == (0, b"")


def test_a_drill_that_its_client_leaves_is_mended(home: Home) -> None:
    dual(home)
    home.start()
    params = {"name": "drill", "arguments": {"scenarios": ["hang"]}}
    with served(home) as running:
        assert running.stdin is not None
        running.stdin.write(opening() + line("tools/call", id=2, params=params))
        running.stdin.flush()
        stopped = wait_stopped(home)
        _, words = running.communicate(timeout=60)

    assert (running.returncode, words) == (0, b"")
    (evidence,) = home.paths.state.glob("drills/*/drill.json")
    assert json.loads(evidence.read_text())["interrupted"] is True
    assert not is_stopped(stopped)


def wait_stopped(home: Home) -> int:
    """Until a drill has stopped a server; its pid."""
    pids: list[int] = [info["pid"] for info in home.status()["services"]]
    found: list[int] = []

    def look() -> bool:
        found.extend(filter(is_stopped, pids))
        return bool(found)

    wait_until(look, "a server that hangs")
    return found[0]


WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"mcp", "mcp_types", "anyio"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from llmsup.cli.main import main
sys.exit(main(["mcp"]))
"""


def test_without_the_extra_it_says_how_to_get_it(home: Home) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env=home.environ, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: llmsup mcp needs the MCP SDK, which is not installed (or an old one is)",
        "hint: pip install 'llmsup[mcp]'",
    ]
