"""Scenarios that break what is around the servers: the daemon, the gateway, the disk."""

import asyncio
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from llmsup.config.files import digest
from llmsup.control.client import daemon_is_alive
from llmsup.control.wire import Status
from llmsup.drill import judgement
from llmsup.drill.ground import LOOK_PERIOD_S, WHOLE_TIMEOUT_S, Ground, environ, of
from llmsup.drill.judgement import Allowed, Finding, Span
from llmsup.drill.report import Broken
from llmsup.drill.servers import allowed, forgive
from llmsup.errors import LlmsupError
from llmsup.host import procfs
from llmsup.host.fetch import fetch
from llmsup.services.launch import Target, Via
from llmsup.units import GATEWAY

HEADLESS_S = 1.0
SYSTEMD_PATIENCE_S = 15.0
SERVES_WITHIN_S = 0.3
GATEWAY_LOOK_PERIOD_S = 0.002
KILL_TIMEOUT_S = 5.0
NO_DISK_S = 1.0
CLI = "import sys; from llmsup.cli.main import main; sys.exit(main(sys.argv[1:]))"


async def daemon(ground: Ground) -> Broken:
    """SIGKILL to the daemon: nothing needs it to be served, and the next one adopts everything."""
    pid = await ground.daemon_pid()
    python = os.fsdecode(procfs.read(pid, "cmdline").split(b"\0")[0])
    variables = environ(pid)
    async with ground.traffic() as traffic:
        before = _pids(await ground.look())
        began = time.monotonic()
        try:
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(HEADLESS_S)
            asked = time.monotonic()
        finally:
            said = await asyncio.shield(_start_daemon(ground, python, variables))
        whole_at = await ground.until_whole()
        after = _pids(await ground.look())
    away = Span(began, whole_at)
    kept = sum(after.get(name) == pid for name, pid in before.items())
    did = f"SIGKILL to the daemon (pid {pid}); a new one after {HEADLESS_S:g} s of traffic"
    findings = [
        judgement.failures(traffic.records, Allowed.NONE, away),
        judgement.in_flight(traffic.records, away),
        Finding(f"{kept} of {len(before)} processes kept", "all", kept == len(before)),
        judgement.recovered("adopted", Span(asked, whole_at), WHOLE_TIMEOUT_S),
        *([Finding(said, "a daemon that starts", holds=False)] if said else []),
    ]
    return Broken(did, away, traffic.records, findings)


async def gateway(ground: Ground) -> Broken:
    """SIGKILL to Envoy: connections break and are refused until its successor serves."""
    async with ground.traffic() as traffic:
        victim = await ground.service(GATEWAY)
        pid = await ground.pid(GATEWAY)
        began = time.monotonic()
        await asyncio.to_thread(_kill, pid)
        served = Span(began, await _first_answer(ground, WHOLE_TIMEOUT_S))
        await ground.until_ready(GATEWAY, victim["generation"], WHOLE_TIMEOUT_S)
    findings = [
        judgement.failures(traffic.records, Allowed.AWAY, served),
        judgement.in_flight(traffic.records, served),
        judgement.recovered("serving again", served, SERVES_WITHIN_S),
    ]
    return Broken(f"SIGKILL to Envoy (pid {pid})", served, traffic.records, findings)


async def disk(ground: Ground) -> Broken:
    """No byte of the daemon reaches the disk, and a service of the route is stopped meanwhile."""
    pid, first = await ground.daemon_pid(), ground.first
    async with ground.traffic() as traffic:
        generation = (await ground.service(first))["generation"]
        began = time.monotonic()
        try:
            with without_disk(pid):
                await _to_the_end(partial(ground.control.stop, [first], now=True))
                stopped_at = await ground.until(
                    lambda now: of(now, first)["state"] == "stopped", WHOLE_TIMEOUT_S
                )
                await asyncio.sleep(NO_DISK_S)
        finally:
            await asyncio.to_thread(forgive, ground)
        within_s = ground.spec.start_timeout_s
        away = Span(began, await ground.until_ready(first, generation, within_s))
        lists_at = await _lists_agree(ground, WHOLE_TIMEOUT_S)
        still = await ground.daemon_pid()
    did = (
        f"simulated: RLIMIT_FSIZE 0 on the daemon (pid {pid}), so that whatever it writes to a "
        f"file fails with EFBIG as on a full disk; {first} stopped and started meanwhile"
    )
    findings = [
        judgement.failures(traffic.records, allowed(ground), away),
        judgement.in_flight(traffic.records, away),
        *judgement.meanwhile(traffic.records, away, first),
        Finding("daemon still there", "the same daemon", still == pid),
        judgement.recovered(f"{first} stopped", Span(began, stopped_at), WHOLE_TIMEOUT_S),
        judgement.recovered("lists written", Span(began, lists_at), WHOLE_TIMEOUT_S),
        judgement.recovered(f"{first} ready again", away, within_s),
    ]
    return Broken(did, away, traffic.records, findings)


@contextmanager
def without_disk(pid: int) -> Iterator[None]:
    """Whatever the process writes to a file fails. What it starts meanwhile would inherit that."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


async def _to_the_end(call: Callable[[], object]) -> None:
    """Call it in a thread. Cancelled, too, it is over after this: nothing is asked any later."""
    task = asyncio.create_task(asyncio.to_thread(call))
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.gather(task, return_exceptions=True)


def why_no_daemon(ground: Ground) -> str:
    """Why the daemon cannot be replaced by one like it."""
    path = ground.loaded.path
    if digest(path) != ground.status["daemon"]["profile_digest"]:
        return f"{path} has changed since the start, so a new daemon would be another one"
    return ""


async def _start_daemon(ground: Ground, python: str, variables: dict[str, str]) -> str:
    """Have a daemon again, as a person of this environment would; systemd's where it keeps ours.

    Returns what was said where that failed.
    """
    deadline = time.monotonic() + SYSTEMD_PATIENCE_S
    while "NOTIFY_SOCKET" in variables and time.monotonic() < deadline:
        if daemon_is_alive(ground.paths):
            return ""
        await asyncio.sleep(LOOK_PERIOD_S)
    info = ground.status["daemon"]
    sets = [word for text in info["overrides"] for word in ("--set", text)]
    start = await asyncio.create_subprocess_exec(
        *(python, "-P", "-c", CLI, "start", info["profile_path"], *sets),
        env=variables,
        start_new_session=True,  # a Ctrl-C is for the drill alone
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await start.communicate()
    return said.decode(errors="replace").strip() if start.returncode else ""


def _kill(pid: int) -> None:
    """SIGKILL, and seen to have ended: what answers from now on is another process."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], KILL_TIMEOUT_S)
    finally:
        os.close(pidfd)


async def _first_answer(ground: Ground, within_s: float) -> float | None:
    """When the gateway answered anything on a new connection."""
    host, port = ground.address
    target = Target(Via.HTTP, host=host, port=port, path="/v1/models")
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, TimeoutError):
            await fetch(target, timeout_s=1.0)
            return time.monotonic()
        await asyncio.sleep(GATEWAY_LOOK_PERIOD_S)
    return None


async def _lists_agree(ground: Ground, within_s: float) -> float | None:
    """When every upstream list was as desired, as published, and as Envoy has it."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with suppress(LlmsupError):
            lists = await asyncio.to_thread(ground.control.upstreams)
            if all(each["desired"] == each["published"] == each["confirmed"] for each in lists):
                return time.monotonic()
        await asyncio.sleep(LOOK_PERIOD_S)
    return None


def _pids(status: Status) -> dict[str, int | None]:
    return {each["service"]: each["pid"] for each in status["services"] if each["want"] == "up"}
