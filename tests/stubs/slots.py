"""The slot of a stub: a prompt is the bytes of the last request, and a file is one of llama.cpp's.

What SLOTS in its environment says is wrong with it: "hangs" or "refuses" (501) when it is asked to
save, "fails" to (500), "cuts" the file off, "lies" about the tokens in it; "dies" when it restores;
"forgets" what it restored, or takes long to compute it ("computes").
"""

import asyncio
import json
import os
import struct
from pathlib import Path
from typing import Any

MAGIC = b"qsgg"
STATE = b"keys and values"


class Slot:
    """What it holds, and the directory that it is saved to; empty: it has no such endpoints."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.tokens: list[int] = []
        self.fault = os.environ.get("SLOTS", "")

    def is_tried(self, body: bytes) -> bool:
        """Whether a request is a prompt of tokens, which tells what the slot holds."""
        return bool(self.directory) and body.startswith(b'{"prompt":[')

    async def answer(self, path: str, query: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        asked = json.loads(body)
        if path == "/completion":
            return 200, {"timings": {"cache_n": await self._cached(asked["prompt"])}}
        if not self.directory or self.fault == "refuses":
            return 501, {"error": {"message": "This server does not support slots action."}}
        file = Path(self.directory, asked["filename"])
        return await (self._save(file) if query == "action=save" else self._restore(file))

    async def _save(self, file: Path) -> tuple[int, dict[str, Any]]:
        if self.fault == "hangs":
            await asyncio.Event().wait()
        if self.fault == "fails":
            file.write_bytes(MAGIC)
            return 500, {"error": {"message": "Unable to save slot"}}
        count = len(self.tokens) + (2**30 if self.fault == "lies" else 0)
        data = struct.pack("<4sIIiII", MAGIC, 4, len(self.tokens) + 4, -1, 1, count)
        data += struct.pack(f"<{len(self.tokens)}iI", *self.tokens, 0) + STATE
        file.write_bytes(data[:-1] if self.fault == "cuts" else data)
        return 200, {"n_saved": len(self.tokens), "n_written": len(data)}

    async def _restore(self, file: Path) -> tuple[int, dict[str, Any]]:
        if self.fault == "dies":
            os.abort()
        data = file.read_bytes()
        if not data.endswith(STATE):
            os.abort()  # as llama-server does
        (count,) = struct.unpack_from("<I", data, 20)
        self.tokens = list(struct.unpack_from(f"<{count}i", data, 24))
        return 200, {"n_restored": count}

    async def _cached(self, prompt: list[int]) -> int:
        """How many tokens of the prompt it holds."""
        if self.fault == "computes":
            await asyncio.Event().wait()
        if self.fault == "forgets":
            self.tokens = []
        same = [one == other for one, other in zip(self.tokens, prompt, strict=False)]
        return same.index(False) if False in same else len(same)
