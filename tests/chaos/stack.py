"""The stack that is broken: stub servers behind the real Envoy, kept by the real daemon."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from tests.chaos.faults import (
    DAEMON,
    EXTRA,
    SERVERS,
    Fault,
    Freeze,
    Kill,
    Reload,
    Shape,
    Steal,
    Theft,
)
from tests.home import Home, free_ports, is_alive, stub, wait_until

REVISION = "STUB_REVISION"
KEYS: dict[str, object] = {
    "readiness": {"http_get": "/health", "period": "200ms", "timeout": "500ms"},
    "restart": {"backoff": "50ms", "max_backoff": "200ms", "max_deaths": 10000},
    "liveness": {"timeout": "2s"},
    "grace_period": "2s",
}


class ChaosStack:
    """A home, the ports of its servers, and the shape its profile has now.

    `killed_at` is the monotonic time at which the last victims of a Kill were seen to be gone.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        names = (*SERVERS, EXTRA)
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.shape = Shape()
        self.killed_at = 0.0
        self.write(self.shape)

    def write(self, shape: Shape) -> None:
        """The profile; each revision changes the environment and an argument of its launch."""
        text = ""
        for name in shape.services:
            revision = shape.revisions.get(name, 0)
            port = self.ports[name]
            delay_ms = 2 + revision % 2
            options = ("--port", port, "--name", name, "--delay-ms", delay_ms, "--reuse-port")
            command = stub("upstream.py", *options)
            env = {REVISION: str(revision)}
            text += Home.command(name, command, port=port, env=env, **KEYS)
        for route, services in shape.routes.items():
            listed = ", ".join(f'"{name}"' for name in services)
            text += f"[route.{route}]\nservices = [{listed}]\n"
        self.home.write(text)
        self.shape = shape

    async def inflict(self, fault: Fault) -> None:
        """Do it, and return once whatever held it up has been taken away."""
        match fault:
            case Kill(victims, pause_s):
                await asyncio.to_thread(self._kill, victims)
                if DAEMON in victims:
                    await asyncio.sleep(pause_s)
                    await asyncio.to_thread(self.home.start, "--no-wait")
            case Freeze(victim, for_s):
                with frozen(self._pid(victim)):
                    await asyncio.sleep(for_s)
            case Steal(victim, how, for_s):
                daemon, server = self._pid(DAEMON), self._pid(victim)
                with ExitStack() as stolen:
                    with frozen(daemon):
                        kill(server)
                        stolen.enter_context(stranger(self.ports[victim], how))
                    await asyncio.sleep(for_s)
            case Reload(shape, _):
                self.write(shape)
                await asyncio.to_thread(self._reload)

    def _pid(self, name: str) -> int:
        pid = self.home.daemon_pid() if name == DAEMON else self.home.service(name)["pid"]
        assert isinstance(pid, int), f"{name} has no process"
        return pid

    def _kill(self, victims: tuple[str, ...]) -> None:
        kill(*(self._pid(name) for name in victims))
        self.killed_at = time.monotonic()

    def _reload(self) -> None:
        result = self.home.cli("reload")
        assert result.returncode == 0, result.stderr


def kill(*pids: int) -> None:
    """SIGKILL to all at once, and seen to be gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids)), f"the end of {pids}")


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stopped for the length of the block. A pidfd, since the process may be replaced meanwhile."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        yield
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)


@contextmanager
def stranger(port: int, how: Theft) -> Iterator[None]:
    """Somebody who listens on the port and answers nobody; what it was sent is reset in the end."""
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past lingering connections
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, how is Theft.SHARES)
        thief.bind(("127.0.0.1", port))
        thief.listen()
        yield
