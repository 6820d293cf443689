"""The `llmsup` program: the one place where errors end."""

import os
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime

from llmsup.cli.status import status
from llmsup.cli.terminal import OutputClosedError, say
from llmsup.config.paths import paths
from llmsup.errors import LlmsupError

INTERRUPTED = 130  # 128 + SIGINT
OUTPUT_CLOSED = 141  # 128 + SIGPIPE


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status. Every error ends here, as a line and a hint."""
    try:
        return _called(argv)
    except OutputClosedError:
        # What is still buffered would fail again when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return OUTPUT_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _called(argv: Sequence[str]) -> int:
    try:
        return _call(argv)
    except LlmsupError as error:
        _report(error.message, error.hint)
        return error.exit_code
    except OutputClosedError:
        raise
    except Exception as error:
        _report(f"unexpected {type(error).__name__}: {error}", _kept_traceback())
        return LlmsupError.exit_code


def _call(argv: Sequence[str]) -> int:
    """Everything goes through Typer, save what scripts and prompts ask all the time.

    Typer alone takes longer to import than `llmsup status` may take (docs/decisions).
    """
    match list(argv):
        case ["status"]:
            return status(as_json=False)
        case ["status", "--json"]:
            return status(as_json=True)
    from llmsup.cli.commands import call  # noqa: PLC0415

    return call(argv)


def _report(message: str, hint: str) -> None:
    for line in message.splitlines():
        say(f"error: {line}")
    if hint:
        say(f"hint: {hint}")


def _kept_traceback() -> str:
    """Write the traceback of the exception at hand to a file; returns where it is."""
    try:
        logs_dir = paths().logs
        logs_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = logs_dir / "crash.log"
        with file.open("a") as crash_log:
            crash_log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {sys.argv}\n")
            crash_log.write(traceback.format_exc() + "\n")
    except OSError as error:
        return f"the traceback could not be kept: {error}"
    return f"this is a bug; its traceback is in {file}"
