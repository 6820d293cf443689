"""The daemon: composition root. Lock, leftovers, stack, control socket, signals, end.

Started by `llmsup start` as `python -m llmsup.daemon --profile FILE`; it writes what it has to say
to stderr, which `llmsup start` points at the daemon's log.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from llmsup.config.load import Loaded, load
from llmsup.config.paths import Paths, paths
from llmsup.control.api import app
from llmsup.control.command import daemon_argv, log_level
from llmsup.control.server import serve
from llmsup.errors import LlmsupError
from llmsup.host import leftovers
from llmsup.host.lock import Lock
from llmsup.host.process import reap
from llmsup.stack import STOP_SIGNALS, Stack

log = logging.getLogger("llmsup.daemon")


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="llmsup.daemon", description=__doc__)
    parser.add_argument("--profile", required=True, help="a profile's name or file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--lock-fd", type=int, help="the lock, inherited over an execve")
    arguments = parser.parse_args(argv)
    try:
        _log_to_stderr(log_level(os.environ))
        home = paths()
        home.create()
        inherited = arguments.lock_fd
        lock = Lock.acquire(home.lock) if inherited is None else Lock.inherit(inherited)
        loaded = load(
            arguments.profile,
            environ=os.environ,
            overrides=arguments.overrides,
            config_dir=home.config,
        )
        if asyncio.run(_run(loaded, home)):
            _become_new_daemon(arguments.profile, arguments.overrides, lock)
        lock.release()
    except KeyboardInterrupt:  # before the first signal handler: nothing has been started yet
        return 130
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except LlmsupError as error:
        for line in error.message.splitlines():
            sys.stderr.write(f"error: {line}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return error.exit_code
    return 0


def _become_new_daemon(profile: str, overrides: Sequence[str], lock: Lock) -> None:
    """In place: the processes stay our children, the lock ours, and systemd's main process."""
    command = [*daemon_argv(profile, overrides), "--lock-fd", str(lock.keep_over_exec())]
    os.execv(command[0], command)  # noqa: S606 - no shell is meant


async def _run(loaded: Loaded, home: Paths) -> bool:
    """Keep the stack until it has stopped (False) or is handed over to a new daemon (True)."""
    reap()
    stack = Stack(loaded, home, os.environ)
    # First: who asked for anything meanwhile would meet services that nobody wants yet.
    await stack.prepare()
    _follow_signals(stack)
    async with serve(app(stack), home.control_socket):
        stack.begin()
        log.info("up pid=%d profile=%s", os.getpid(), loaded.name)
        ends = [asyncio.create_task(each.wait()) for each in (stack.stopped, stack.handed_over)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if stack.handed_over.is_set():
        log.info("handing over")
        return True
    await asyncio.to_thread(leftovers.end, home)
    log.info("stopped")
    return False


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _follow_signals(stack: Stack) -> None:
    """SIGTERM and SIGINT stop the stack; the second one does not wait for requests."""
    seen = 0

    def stop() -> None:
        nonlocal seen
        seen += 1
        stack.shut_down(now=seen > 1)

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # A closing terminal must not take the stack with it.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)


if __name__ == "__main__":
    sys.exit(main())
