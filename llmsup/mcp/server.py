"""The tools and resources as the SDK of the protocol wants them, and the session on stdio."""

import json
from collections.abc import Mapping
from typing import Any

import anyio
import mcp_types as types
from anyio import from_thread
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError

from llmsup import __version__
from llmsup.config.paths import Paths
from llmsup.control.wire import SwitchProgress
from llmsup.errors import LlmsupError
from llmsup.mcp import arguments, replies
from llmsup.mcp.resources import RESOURCES
from llmsup.mcp.tools import TOOLS, Reply, Tool, call_tool, refusal

INSTRUCTIONS = (
    "llmsup keeps local language models up on one graphics card behind an OpenAI-compatible "
    "gateway. get_status and why tell how it is; switch_model changes what is served."
)
JSON_TYPE = "application/json"
MIB = 2**20


def serve(home: Paths) -> None:
    """Answer one client on stdin and stdout until it goes."""
    anyio.run(_serve, home)


async def _serve(home: Paths) -> None:
    server = _server(home)
    async with stdio_server() as (received, sent):
        await server.run(received, sent, server.create_initialization_options())


def _server(home: Paths) -> Server[Any]:
    async def list_tools(_context: Any, _params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_declared(tool) for tool in TOOLS])

    async def call(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        tool = next((each for each in TOOLS if each.name == params.name), None)
        if tool is None:
            known = ", ".join(each.name for each in TOOLS)
            raise MCPError(types.INVALID_PARAMS, f"unknown tool: {params.name}; there are {known}")

        def tell(progress: SwitchProgress) -> None:
            done, total = progress["read_bytes"] / MIB, progress["size_bytes"] / MIB or None
            from_thread.run(context.session.report_progress, done, total, words(progress))

        return _result(await call_tool(tool, home, params.arguments or {}, tell))

    async def list_resources(_context: Any, _params: Any) -> types.ListResourcesResult:
        return types.ListResourcesResult(
            resources=[
                types.Resource(
                    name=each.name,
                    uri=each.uri,
                    description=each.description,
                    mime_type=JSON_TYPE,
                )
                for each in RESOURCES
            ]
        )

    async def read(
        _context: Any, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        uri = str(params.uri)
        resource = next((each for each in RESOURCES if each.uri == uri), None)
        if resource is None:
            known = ", ".join(each.uri for each in RESOURCES)
            raise MCPError(types.INVALID_PARAMS, f"unknown resource: {uri}; there are {known}")
        try:
            text = _json(await resource.read(home))
        except LlmsupError as error:
            raise MCPError(types.INTERNAL_ERROR, _sentence(refusal(error))) from None
        contents = types.TextResourceContents(uri=uri, mime_type=JSON_TYPE, text=text)
        return types.ReadResourceResult(contents=[contents])

    return Server(
        "llmsup",
        version=__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call,
        on_list_resources=list_resources,
        on_read_resource=read,
    )


def words(progress: SwitchProgress) -> str:
    """How far a switch is, on one line."""
    target = progress.get("profile") or progress["service"]
    text = f"{target}: {progress['phase']} {progress['model']}".rstrip()
    return f"{text}, {progress['elapsed_s']:.0f} s"


def _declared(tool: Tool) -> types.Tool:
    return types.Tool(
        name=tool.name,
        description=tool.description,
        input_schema=arguments.schema(tool.arguments),
        output_schema=replies.schema(tool.replies),
        annotations=types.ToolAnnotations(
            read_only_hint=tool.is_read_only,
            destructive_hint=tool.is_destructive,
            idempotent_hint=tool.is_idempotent,
            open_world_hint=False,
        ),
    )


def _result(reply: Reply) -> types.CallToolResult:
    """The document both as it is and as text, for clients that read only that."""
    document = reply.document
    text = _sentence(document) if "error" in document else _json(document)
    return types.CallToolResult(
        content=[types.TextContent(text=text)],
        structured_content=dict(document),
        is_error=reply.is_error,
    )


def _sentence(document: Mapping[str, Any]) -> str:
    hint = f" (hint: {document['hint']})" if document["hint"] else ""
    return f"{document['error']}{hint}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
