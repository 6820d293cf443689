"""A private llmsup home for a test: profile, daemon, command line; no process stays behind."""

import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmsup.config.paths import Paths, paths
from llmsup.host import leftovers, ports
from llmsup.host.process import marked

REPOSITORY = Path(__file__).parents[1]
STUBS = Path(__file__).parent / "stubs"
LLMSUP = str(Path(sys.executable).with_name("llmsup"))
DEADLINE_S = 30.0
PORTS = 1000


def _ports() -> Iterator[int]:
    """Those of this worker, again and again.

    The kernel gives out none of them: one that it gave was taken by a test of another worker before
    this one listened there. Nor does llmsup, which begins at 20000.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, skipped = 10000 + PORTS * (worker % 10), secrets.randbelow(PORTS)
    return (first + (skipped + number) % PORTS for number in itertools.count())


PORTS_IN_TURN = _ports()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; distinct."""
    return list(itertools.islice(filter(ports.is_free, PORTS_IN_TURN), count))


def wait_until(
    condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S, pause_s: float = 0.01
) -> None:
    """Look until `condition` holds; fail with `what` after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(pause_s)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def stub(name: str, *arguments: object) -> list[str]:
    """The command of one of the programs in tests/stubs."""
    return [sys.executable, str(STUBS / name), *map(str, arguments)]


class Home:
    """One home below a short temporary directory (a Unix socket's path is at most 107 bytes)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(tempfile.mkdtemp(prefix="llmsup-"))
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LLMSUP_", "LLAMA_ARG_", "CHAT_", "CODE_"))
        }
        self.environ |= {"LLMSUP_HOME": str(self.root), "NO_COLOR": "1", "COLUMNS": "200"}
        self.paths: Paths = paths(self.environ)
        self.profile = self.root / "test.toml"
        (self.gateway_port,) = free_ports(1)

    # --- profile

    def write(self, text: str) -> Path:
        """Write the profile; a gateway table is added where the text has none."""
        if "[gateway]" not in text:
            text = f'[gateway]\nlisten = "127.0.0.1:{self.gateway_port}"\n' + text
        self.profile.write_text(text)
        return self.profile

    @staticmethod
    def command(name: str, command: list[str], **keys: object) -> str:
        """A `command` service as TOML; `keys` are written as JSON values, which TOML shares."""
        lines = [f"[service.{name}]", 'kind = "command"', f"command = {json.dumps(command)}"]
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items()]
        return "\n".join(lines) + "\n"

    # --- command line

    def cli(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run `llmsup …` and return what it said."""
        return subprocess.run(
            [LLMSUP, *arguments],
            env=self.environ, cwd=self.root, capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip

    def start(self, *arguments: str, timeout_s: float = 60.0) -> None:
        """`llmsup start` of this home's profile; fails with its output where that fails."""
        result = self.cli("start", str(self.profile), *arguments, timeout_s=timeout_s)
        assert result.returncode == 0, f"{result.stdout}{result.stderr}\n{self.daemon_log()}"

    def status(self) -> dict[str, Any]:
        """What the control socket says now."""
        from llmsup.control.client import Client  # noqa: PLC0415 - tests of it import it first

        return dict(Client(self.paths).status())

    def upstreams(self) -> list[dict[str, Any]]:
        """Each route's list as desired, as published, and as Envoy has it."""
        from llmsup.control.client import Client  # noqa: PLC0415 - tests of it import it first

        return [dict(each) for each in Client(self.paths).upstreams()]

    def service(self, name: str) -> dict[str, Any]:
        """One service as `status` has it."""
        return next(each for each in self.status()["services"] if each["service"] == name)

    def wait_state(self, name: str, state: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Until the service is in the state; returns it."""
        try:
            wait_until(lambda: self.service(name)["state"] == state, "", deadline_s)
        except AssertionError:
            raise AssertionError(
                f"{name} is not {state}: {self.service(name)}\n{self.daemon_log()}"
            ) from None
        return self.service(name)

    def wait_replaced(self, old: dict[str, Any], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Until a later generation of the service `old` is ready; returns it."""
        name, last = old["service"], old["generation"]
        wait_until(lambda: self.service(name)["generation"] > last, f"a new {name}", deadline_s)
        return self.wait_state(name, "ready", deadline_s)

    def events(self) -> list[dict[str, Any]]:
        """The event journal."""
        if not self.paths.events.exists():
            return []
        return [json.loads(line) for line in self.paths.events.read_text().splitlines()]

    def daemon_log(self) -> str:
        """The end of the daemon's log, for messages of failed tests."""
        log = self.paths.daemon_log
        return log.read_text(errors="replace")[-4000:] if log.exists() else ""

    def processes(self) -> list[int]:
        """Live processes that carry this home's mark."""
        return [pid for pid in marked(leftovers.home_mark(self.paths)) if is_alive(pid)]

    def daemon_pid(self) -> int | None:
        """The pid in the lock file, if that process lives."""
        try:
            pid = int(self.paths.lock.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if is_alive(pid) else None

    def close(self) -> None:
        """End what is left, by pid, and remove the directory."""
        pid = self.daemon_pid()
        if pid is not None:
            os.kill(pid, 9)
            wait_until(lambda: not is_alive(pid), "the daemon's end")
        leftovers.end(self.paths)
        shutil.rmtree(self.root, ignore_errors=True)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)
