"""A stack that only remembers what it was asked, behind the real control API."""

import asyncio
import contextlib
import fcntl
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from llmsup.config.paths import Paths
from llmsup.control.api import app
from llmsup.control.server import serve
from llmsup.control.wire import (
    Answer,
    ModelInfo,
    ServiceInfo,
    Status,
    SwitchProgress,
    SwitchResult,
    UpstreamsInfo,
)
from llmsup.errors import LlmsupError, UsageError


def service(name: str, state: str = "ready", **changed: object) -> ServiceInfo:
    """A service of a snapshot."""
    info: ServiceInfo = {
        "service": name,
        "kind": "llama-server",
        "want": "up",
        "state": state,
        "pid": 4242,
        "generation": 1,
        "port": 8001,
        "model": None,
        "gpu_layers": None,
        "layers": None,
        "planned_bytes": None,
        "measured_bytes": None,
        "restarts": 0,
        "uptime_s": 12.0,
        "why": "",
    }
    info.update(changed)  # type: ignore[typeddict-item]
    return info


def snapshot(*services: ServiceInfo) -> Status:
    """A stack of these services."""
    return {
        "daemon": {
            "pid": 123,
            "version": "0.1.0",
            "uptime_s": 180.0,
            "profile": "demo",
            "profile_path": "/home/me/demo.toml",
            "profile_digest": "",
            "overrides": [],
            "mode": "dual",
            "stopping": False,
            "restarting": [],
            "troubles": [],
        },
        "gpu": None,
        "gpu_why": "no NVIDIA driver is installed",
        "gateway": "127.0.0.1:8000",
        "services": list(services),
        "routes": [],
    }


class FakeStack:
    """Implements `control.api.Stack`; `asked` holds the verbs with their arguments.

    After the first verb each status is the next of `later`, as long as there is one.
    """

    def __init__(self, *services: ServiceInfo, later: Iterable[Status] = ()) -> None:
        self.snapshot = snapshot(*services)
        self.later = list(later)
        self.ends_when_asked = True
        self.asked: list[tuple[str, tuple[str, ...], bool]] = []
        self.is_broken = False
        self.switching: list[SwitchProgress | SwitchResult] = []
        self.shut = threading.Event()

    def status(self) -> Status:
        if self.is_broken:
            raise RuntimeError("no status today")
        if self.asked and self.later:
            self.snapshot = self.later.pop(0)
        return self.snapshot

    def upstreams(self) -> list[UpstreamsInfo]:
        return [{"route": "chat-7b", "desired": ["chat"], "published": ["chat"], "confirmed": None}]

    def start(self, services: tuple[str, ...]) -> Answer:
        return self._note("start", services, now=False)

    def stop(self, services: tuple[str, ...], *, now: bool) -> Answer:
        return self._note("stop", services, now=now)

    def restart(self, services: tuple[str, ...], *, now: bool) -> Answer:
        if self.is_broken:
            raise LlmsupError("not now", hint="later")
        return self._note("restart", services, now=now)

    async def models(self) -> list[ModelInfo]:
        return []

    async def switch(
        self, target: str, model: str | None
    ) -> AsyncIterator[SwitchProgress | SwitchResult]:
        self._note("switch", (target,), now=False)

        async def lines() -> AsyncIterator[SwitchProgress | SwitchResult]:
            for line in self.switching:
                yield line

        return lines()

    def follow_switch(self) -> AsyncIterator[SwitchProgress | SwitchResult]:
        raise LlmsupError("nothing is being switched")

    async def reload(self) -> Answer:
        return self._note("reload", (), now=False)

    def hand_over(self) -> Answer:
        return self._note("hand_over", (), now=False)

    def shut_down(self, *, now: bool) -> Answer:
        if self.ends_when_asked:
            self.shut.set()
        return self._note("shut_down", (), now=now)

    def _note(self, verb: str, services: tuple[str, ...], *, now: bool) -> Answer:
        known = [info["service"] for info in self.snapshot["services"]]
        if unknown := [name for name in services if name not in known]:
            raise UsageError(
                f"unknown service: {', '.join(unknown)}",
                hint=f"known services: {', '.join(known)}",
            )
        self.asked.append((verb, services, now))
        return {"changed": list(services), "message": verb}


@contextlib.contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold the daemon's lock, as pid 123."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write("123\n")
        file.flush()
        yield


@contextlib.contextmanager
def serving(paths: Paths, stack: FakeStack) -> Iterator[None]:
    """Serve `stack` on the control socket from a thread, with the lock held, until it is shut."""
    paths.create()
    entered = threading.Event()

    async def work() -> None:
        async with serve(app(stack), paths.control_socket):
            entered.set()
            await asyncio.to_thread(stack.shut.wait)

    def run() -> None:
        with held(paths.lock):
            asyncio.run(work())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert entered.wait(10)
        yield
    finally:
        stack.shut.set()
        thread.join(10)
        assert not thread.is_alive()
