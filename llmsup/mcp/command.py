"""Verbs of the command line, run as a process of their own and understood by what they print."""

import asyncio
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from anyio import CancelScope

from llmsup.errors import LlmsupError

# -P: what lies in the client's working directory is not imported.
PROGRAM = (sys.executable, "-P", "-c", "from llmsup.cli.main import run; run()")
ERROR = "error: "
HINT = "hint: "
WORDS_LINES = 8


@dataclass(frozen=True)
class Said:
    """What a verb said: its data, and its words apart from errors and hints."""

    status: int
    data: str
    error: str
    hint: str
    words: str

    def require_data(self) -> None:
        """Raise LlmsupError where there is no data."""
        if not self.data.strip():
            raise LlmsupError(self.error or self.words or "it said nothing", hint=self.hint)

    def json(self) -> Any:
        """The data. Raises LlmsupError where there is none."""
        self.require_data()
        return json.loads(self.data)

    def json_lines(self) -> list[Any]:
        """The data, a document a line."""
        return [json.loads(line) for line in self.data.splitlines()]


async def run(*argv: str) -> Said:
    """Run `llmsup argv…` to its end. Where the caller is cancelled it is asked to end first."""
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        data, words = await process.communicate()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.terminate()
        with CancelScope(shield=True):  # else asyncio kills it, and a drill would mend nothing
            await process.communicate()
        raise
    return parse(process.returncode or 0, data.decode(), words.decode(errors="replace"))


def parse(status: int, data: str, words: str) -> Said:
    """What was printed on stdout and stderr."""
    lines = words.splitlines()
    return Said(
        status,
        data,
        error=_joined(line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)),
        hint=_joined(line.removeprefix(HINT) for line in lines if line.startswith(HINT)),
        words="\n".join([x for x in lines if not x.startswith((ERROR, HINT))][-WORDS_LINES:]),
    )


def _joined(lines: Iterable[str]) -> str:
    return "; ".join(lines)
