"""Waits for the daemon and its services, showing how they get on."""

import time
from collections.abc import Collection, Mapping

from llmsup.cli import terminal
from llmsup.cli.outcome import Outcome, outcome, troubles, unready
from llmsup.cli.progress import POLL_S, progress
from llmsup.config.paths import Paths
from llmsup.config.units import duration
from llmsup.control.client import Client, daemon_is_alive, wait_gone
from llmsup.control.wire import Status
from llmsup.errors import LlmsupError, NotRunningError, UnknownStateError

SOCKET_TIMEOUT_S = 15.0
POLL_SOCKET_S = 0.02


def reach(paths: Paths) -> Status | None:
    """The stack, or None where there is no daemon; a moment without a socket is waited out.

    A daemon has no socket while it starts and in its last moment. Raises UnknownStateError.
    """
    deadline = time.monotonic() + SOCKET_TIMEOUT_S
    while True:
        try:
            return Client(paths).status()
        except NotRunningError:
            return None
        except UnknownStateError:
            if paths.control_socket.exists() or time.monotonic() >= deadline:
                raise
        time.sleep(POLL_SOCKET_S)


def wait_ready(
    client: Client, first_generations: Mapping[str, int], *, timeout_s: float | None = None
) -> Status:
    """Wait until the named services are ready, in these generations or later ones.

    Raises LlmsupError with the reasons where some failed, or with what is missing after
    `timeout_s`. Ctrl-C leaves the stack as it is and says so.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        with progress(first_generations) as show:
            while True:
                status = client.status()
                show(status)
                if status["daemon"]["stopping"]:
                    raise LlmsupError("the stack is being stopped", hint="llmsup start")
                reached = outcome(status, first_generations)
                late = deadline is not None and time.monotonic() >= deadline
                if reached is not Outcome.WAITING or late:
                    break
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        terminal.say("the stack stays up: llmsup status shows it, llmsup stop ends it")
        raise
    except NotRunningError:
        raise LlmsupError("the daemon has ended meanwhile", hint="llmsup logs daemon") from None
    if reached is Outcome.FAILED:
        found = troubles(status, first_generations)
        service = found[0].partition(" ")[0]
        raise LlmsupError("\n".join(found), hint=f"the rest stays up; llmsup logs {service}")
    if reached is Outcome.WAITING:
        missing = ", ".join(unready(status, first_generations))
        raise LlmsupError(
            f"not ready within {duration(timeout_s or 0)}: {missing}",
            hint="the stack stays up: llmsup status shows it, llmsup stop ends it",
        )
    return status


def wait_stopped(client: Client, names: Collection[str]) -> None:
    """Wait until the named services are stopped. Raises what `Client.status` raises."""
    with progress(names) as show:
        while True:
            status = client.status()
            show(status)
            if all(
                info["state"] == "stopped"
                for info in status["services"]
                if info["service"] in names
            ):
                return
            time.sleep(POLL_S)


def wait_daemon_gone(paths: Paths) -> None:
    """Wait until the daemon has ended; as long as it answers it may take its time."""
    client = Client(paths)
    with progress() as show:
        while paths.control_socket.exists():
            try:
                show(client.status())
            except LlmsupError:
                break
            time.sleep(POLL_S)
    if not wait_gone(paths, timeout_s=SOCKET_TIMEOUT_S):
        raise UnknownStateError(
            f"the daemon (pid {daemon_is_alive(paths)}) closed its socket but does not end",
            hint=f"see {paths.daemon_log}; kill it if it stays so",
        )
