"""The `llmsup` program: the one place where errors end.

Imports are inside `main`, so that Ctrl-C during them ends as quietly as later.
"""
# ruff: noqa: PLC0415

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # 128 + SIGINT
OUTPUT_CLOSED = 141  # 128 + SIGPIPE
FAILED = 1
UNKNOWN = 4


def run() -> None:
    """The console script."""
    from llmsup.config.paths import PRIVATE_UMASK

    os.umask(PRIVATE_UMASK)
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status. Every error ends here, as a line and a hint."""
    try:
        from llmsup.cli import terminal

        terminal.prepare()
        try:
            return _called(argv)
        except terminal.OutputClosedError:
            terminal.discard(sys.stdout)
            return OUTPUT_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _called(argv: Sequence[str]) -> int:
    from llmsup.cli.terminal import OutputClosedError
    from llmsup.errors import LlmsupError

    try:
        return _call(argv)
    except OutputClosedError:
        raise
    except LlmsupError as error:
        _report(error.message, error.hint)
        code = error.exit_code
    except Exception as error:
        code = _report_unexpected(error)
    # 1 is what `status` says of a degraded stack; an error tells nothing of the stack.
    return UNKNOWN if code == FAILED and argv[:1] == ["status"] else code


def _call(argv: Sequence[str]) -> int:
    """Everything goes through Typer, save what scripts and prompts ask all the time.

    Typer alone takes longer to import than `llmsup status` may take (docs/decisions).
    """
    match list(argv):
        case ["status"]:
            from llmsup.cli.status import status

            return status(as_json=False)
        case ["status", "--json"]:
            from llmsup.cli.status import status

            return status(as_json=True)
    from llmsup.cli.commands import call

    return call(argv)


def _report(message: str, hint: str) -> None:
    from llmsup.cli.terminal import say

    for line in message.splitlines():
        say(f"error: {line}")
    if hint:
        say(f"hint: {hint}")


def _report_unexpected(error: Exception) -> int:
    from llmsup.cli.terminal import lost_output

    if isinstance(error, OSError) and _is_of_output(error):
        _report(lost_output(error).message, "")
    else:
        _report(f"unexpected {type(error).__name__}: {error}", _kept_traceback())
    return FAILED


def _is_of_output(error: OSError) -> bool:
    """Whether it came from writing to a stream, as help and lists are: it names no file."""
    import errno

    return error.filename is None and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def _kept_traceback() -> str:
    """Write the traceback of the exception at hand to a file; returns where it is. Never raises."""
    import traceback
    from datetime import UTC, datetime

    from llmsup.config.masking import masked
    from llmsup.config.paths import make_private, paths
    from llmsup.host.private import open_private

    text = traceback.format_exc()
    try:
        logs_dir = paths().logs
        make_private(logs_dir)
        file = logs_dir / "crash.log"
        opened = open_private(file, os.O_WRONLY | os.O_APPEND)
        with os.fdopen(opened, "a", encoding="utf-8", errors="replace") as crash_log:
            moment = datetime.now(UTC)
            crash_log.write(f"{moment:%Y-%m-%dT%H:%M:%SZ} {masked(sys.argv)}\n{text}\n")
    except Exception as error:
        return f"this is a bug; its traceback could not be kept: {error}"
    return f"this is a bug; its traceback is in {file}"
