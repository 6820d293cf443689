"""Starts the daemon in the background, and tells why it did not come up."""

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from llmsup.cli.wait import COMES_UP, POLL_SOCKET_S, on_interrupt
from llmsup.config.paths import Paths
from llmsup.control.client import Client, daemon_is_alive
from llmsup.control.wire import Status
from llmsup.errors import LlmsupError, NotRunningError, UnknownStateError
from llmsup.host import notify
from llmsup.host.private import NotOursError, open_private

DAEMON_TIMEOUT_S = 30.0


def spawn(argv: Sequence[str], home: Paths) -> Status | None:
    """Start the daemon in a session of its own; returns its first answer.

    None where another daemon came first. Raises LlmsupError with what the daemon said.
    """
    with on_interrupt(COMES_UP):
        daemon, offset = _popen(argv, home)
        deadline = time.monotonic() + DAEMON_TIMEOUT_S
        while daemon.poll() is None:
            # The socket may be that of an earlier daemon, not yet replaced, or of another one.
            with suppress(NotRunningError, UnknownStateError):
                status = Client(home).status()
                if status["daemon"]["pid"] == daemon.pid:
                    return status
            if time.monotonic() >= deadline:
                raise UnknownStateError(
                    f"the daemon (pid {daemon.pid}) has not answered for {DAEMON_TIMEOUT_S:g} s",
                    hint=f"see {home.daemon_log}",
                )
            time.sleep(POLL_SOCKET_S)
    if daemon_is_alive(home) is not None:
        return None
    errors, hints = _last_words(home.daemon_log, offset)
    raise LlmsupError(
        "\n".join([f"the daemon ended at once: {errors[0]}", *errors[1:]]),
        hint="; ".join(hints) or f"see {home.daemon_log}",
    )


def _popen(argv: Sequence[str], home: Paths) -> "tuple[subprocess.Popen[bytes], int]":
    """The daemon's process, and where in its log it begins to write."""
    log, offset = _opened_log(home.daemon_log)
    try:
        daemon = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=notify.without(os.environ),  # it is not the main process of whatever we run in
            start_new_session=True,
        )
    except OSError as error:
        raise LlmsupError(f"cannot start {argv[0]}: {error.strerror}") from None
    finally:
        os.close(log)
    return daemon, offset


def _opened_log(path: Path) -> tuple[int, int]:
    """The log for the daemon to append to, and its size. Raises LlmsupError."""
    try:
        log = open_private(path, os.O_WRONLY | os.O_APPEND)
        try:
            # It also shows a full disk, on which the daemon could not say what is wrong.
            os.write(log, f"--- daemon, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}\n".encode())
            return log, os.fstat(log).st_size
        except OSError:
            os.close(log)
            raise
    except OSError as error:
        is_foreign = isinstance(error, NotOursError)
        place = "make room, or set LLMSUP_HOME to a directory you can write"
        raise LlmsupError(
            f"cannot write {path}: {error.strerror}",
            hint="remove what is there" if is_foreign else place,
        ) from None


def _last_words(log: Path, offset: int) -> tuple[list[str], list[str]]:
    """The errors that the daemon wrote after `offset`, or its last line; and its hints."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            written = file.read().decode(errors="replace")
    except OSError:
        written = ""
    lines = [line for line in written.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    return errors or lines[-1:] or ["it said nothing"], hints
