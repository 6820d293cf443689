"""Waits for the daemon and its services, showing how they get on."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmsup.cli import terminal
from llmsup.cli.outcome import Outcome, outcome, troubles, unready
from llmsup.cli.progress import POLL_S, progress
from llmsup.config.paths import Paths
from llmsup.config.units import duration
from llmsup.control.client import Client, NoSocketError, daemon_is_alive, wait_gone
from llmsup.control.wire import ServiceInfo, Status
from llmsup.errors import LlmsupError, NotRunningError, UnknownStateError
from llmsup.host import logfile, procfs

SOCKET_TIMEOUT_S = 5.0
END_TIMEOUT_S = 15.0
REPLACE_TIMEOUT_S = 30.0
POLL_SOCKET_S = 0.02
SIGNAL_PAUSE_S = 0.1
COMES_UP = "the stack keeps coming up: llmsup status shows it, llmsup stop ends it"
STOPS = "it goes on stopping: llmsup status shows it"
DAEMON_MODULE = b"llmsup.daemon"
HEADER = "--- "
"""What the line begins with by which the daemon heads the output of each generation."""

Judge = Callable[[Status], None]
"""Raises LlmsupError where a snapshot shows that it is of no use to wait on."""


@contextmanager
def on_interrupt(words: str) -> Iterator[None]:
    """Say `words` where Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.say(words)
        raise


def reach(paths: Paths) -> Status | None:
    """The stack, or None where there is no daemon; a moment without a socket is waited out.

    A daemon has no socket while it starts and in its last moment. Raises UnknownStateError, and
    NoSocketError for one that stays without.
    """
    deadline = time.monotonic() + SOCKET_TIMEOUT_S
    while True:
        try:
            return Client(paths).status()
        except NotRunningError:
            return None
        except NoSocketError:
            if time.monotonic() >= deadline:
                pid = daemon_is_alive(paths)
                raise NoSocketError(
                    f"the daemon ({f'pid {pid}' if pid else 'pid unknown'}) has had no control "
                    f"socket for {duration(SOCKET_TIMEOUT_S)}",
                    hint=f"llmsup stop ends it; its log is {paths.daemon_log}",
                ) from None
        time.sleep(POLL_SOCKET_S)


def wait_replaced(paths: Paths, asked_at: float) -> Status:
    """Wait until a daemon answers that is younger than `asked_at` (monotonic); its first answer."""
    client = Client(paths)
    while True:
        elapsed_s = time.monotonic() - asked_at
        with suppress(NotRunningError, UnknownStateError):
            status = client.status()
            if status["daemon"]["uptime_s"] < elapsed_s:
                return status
        if elapsed_s > REPLACE_TIMEOUT_S:
            raise UnknownStateError(
                f"no new daemon has answered for {duration(REPLACE_TIMEOUT_S)}",
                hint=f"its servers go on; see {paths.daemon_log}, then llmsup start",
            )
        time.sleep(POLL_SOCKET_S)


def wait_ready(
    paths: Paths,
    first_generations: Mapping[str, int],
    *,
    timeout_s: float | None = None,
    interrupted: str = COMES_UP,
    judge: Judge | None = None,
) -> Status:
    """Wait until the named services are ready, in these generations or later ones.

    Raises LlmsupError with the reasons where some failed, or with what is missing after
    `timeout_s`, or what `judge` raises. Ctrl-C leaves the stack as it is and says `interrupted`.
    """
    client = Client(paths)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        with on_interrupt(interrupted), progress(first_generations) as show:
            while True:
                status = client.status()
                show(status)
                if status["daemon"]["stopping"]:
                    raise LlmsupError("the stack is being stopped", hint="llmsup start")
                if judge is not None:
                    judge(status)
                reached = outcome(status, first_generations)
                late = deadline is not None and time.monotonic() >= deadline
                if reached is not Outcome.WAITING or late:
                    break
                time.sleep(POLL_S)
    except NotRunningError:
        raise LlmsupError("the daemon has ended meanwhile", hint="llmsup logs daemon") from None
    if reached is Outcome.FAILED:
        found = troubles(status, first_generations)
        raise LlmsupError(
            "\n".join(f"{info['service']} {info['state']}: {info['why']}" for info in found),
            hint=_where_to_look(paths, found, status),
        )
    if reached is Outcome.WAITING:
        missing = ", ".join(unready(status, first_generations))
        raise LlmsupError(
            f"not ready within {duration(timeout_s or 0)}: {missing}",
            hint="the stack stays up: llmsup status shows it, llmsup stop ends it",
        )
    return status


def wait_stopped(client: Client, generations: Mapping[str, int]) -> list[str]:
    """Wait until the named services are stopped; returns those that somebody started again.

    `generations` are those before the stop. What is stopped with the daemon is stopped.
    """
    wanted_down: set[str] = set()
    again: set[str] = set()
    with on_interrupt(STOPS), progress(generations) as show, suppress(NotRunningError):
        while True:
            try:
                status = client.status()
            except NoSocketError:  # in its last moment
                time.sleep(POLL_S)
                continue
            show(status)
            infos = [info for info in status["services"] if info["service"] in generations]
            wanted_down |= {info["service"] for info in infos if info["want"] == "down"}
            # One whose dependents stop first is wanted for a while, in its old generation.
            again = {
                info["service"]
                for info in infos
                if info["want"] == "up"
                and (
                    info["service"] in wanted_down
                    or info["generation"] > generations[info["service"]]
                )
            }
            if all(info["state"] == "stopped" or info["service"] in again for info in infos):
                return sorted(again)
            time.sleep(POLL_S)
    return []


def wait_daemon_gone(paths: Paths) -> None:
    """Wait until the daemon has ended; as long as it answers it may take its time."""
    client = Client(paths)
    with on_interrupt(STOPS):
        with progress() as show:
            while paths.control_socket.exists():
                try:
                    show(client.status())
                except LlmsupError:
                    break
                time.sleep(POLL_S)
        if not wait_gone(paths, timeout_s=END_TIMEOUT_S):
            pid = daemon_is_alive(paths)
            raise UnknownStateError(
                f"the daemon{f' (pid {pid})' if pid else ''} closed its socket but does not end",
                hint=f"see {paths.daemon_log}; kill it if it stays so",
            )


def end_unreachable(paths: Paths, *, now: bool) -> bool:
    """Ask the daemon that has no socket to stop by SIGTERM, and wait; False where there is none.

    It may take its time: requests in flight finish first, unless `now`.
    """
    pid = daemon_is_alive(paths)
    if not pid or DAEMON_MODULE not in procfs.read(pid, "cmdline").split(b"\0"):
        return False
    terminal.say(f"the daemon (pid {pid}) has no control socket: ending it by SIGTERM")
    with on_interrupt(STOPS), suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        if now:  # the second one does not wait for requests
            time.sleep(SIGNAL_PAUSE_S)
            os.kill(pid, signal.SIGTERM)
        wait_gone(paths, timeout_s=float("inf"))
    return True


def _where_to_look(paths: Paths, found: Sequence[ServiceInfo], status: Status) -> str:
    name = next((info for info in found if info["state"] == "failed"), found[0])["service"]
    daemon_started_time = time.time() - status["daemon"]["uptime_s"]
    if _has_output(paths.service_log(name), daemon_started_time):
        return f"the rest stays up; llmsup logs {name}"
    return "the rest stays up: llmsup status shows it"


def _has_output(log: Path, since_time: float) -> bool:
    """Whether the last process of a service wrote anything: it may never have existed."""
    try:
        is_recent = log.stat().st_mtime >= since_time
        lines = logfile.tail(log, 1)
    except OSError:
        return False
    return is_recent and bool(lines) and not lines[-1].startswith(HEADER)
