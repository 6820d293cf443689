"""`llmsup mcp`: the MCP server. Its SDK is an extra."""

import sys

from llmsup.cli import terminal
from llmsup.config.paths import paths
from llmsup.errors import LlmsupError

SDK = {"mcp", "mcp_types", "anyio"}


def mcp() -> None:
    """Answer an MCP client on stdin and stdout until it goes. Raises LlmsupError without SDK."""
    try:
        from llmsup.mcp.server import serve  # noqa: PLC0415 - its SDK may be missing
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in SDK:
            raise
        raise LlmsupError(
            "llmsup mcp needs the MCP SDK, which is not installed (or an old one is)",
            hint="pip install 'llmsup[mcp]'",
        ) from None
    if sys.stdin is None or sys.stdout is None:
        raise LlmsupError(
            "stdin or stdout is closed", hint="an MCP client starts llmsup mcp with both"
        )
    if sys.stdin.isatty():
        terminal.say("this speaks MCP on stdin and stdout: a client starts it (Ctrl-C ends it)")
    serve(paths())
