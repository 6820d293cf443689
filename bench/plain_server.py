"""A llama-server by itself: the peer of everything that takes as long as a load and a bit more."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from tests.home import free_ports

LOOK_PERIOD_S = 0.005
LOAD_TIMEOUT_S = 60.0


def arguments_of(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


class PlainServer:
    """One that is up. `load_s`: from its start to the first 200 of its health check.

    `end_s`: from SIGTERM to its exit, once it has ended.
    """

    def __init__(self, port: int, load_s: float) -> None:
        self.port = port
        self.load_s = load_s
        self.end_s = 0.0

    def prompt_tokens(self, body: bytes) -> int:
        """How many tokens it makes of the prompt of a chat completion."""
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        asked = urllib.request.Request(url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return int(json.load(answer)["usage"]["prompt_tokens"])


@contextmanager
def plain_server(argv: Sequence[str], model: Path, log: Path) -> Iterator[PlainServer]:
    """Start it as `argv` says, but with this model and on a port of its own."""
    (port,) = free_ports(1)
    command = replaced(argv, {"--model": str(model), "--port": str(port)})
    with log.open("ab") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() - began > LOAD_TIMEOUT_S:
                raise SystemExit(f"error: llama-server did not become ready; see {log}")
            time.sleep(LOOK_PERIOD_S)
        server = PlainServer(port, time.monotonic() - began)
        yield server
        ended_at = time.monotonic()
        process.terminate()
        process.wait(30)
        server.end_s = time.monotonic() - ended_at
    finally:
        process.kill()
        process.wait()


def replaced(argv: Sequence[str], values: dict[str, str]) -> list[str]:
    """The arguments with other values of these flags."""
    pairs = zip(["", *argv], argv, strict=False)
    return [values.get(before, each) for before, each in pairs]


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
