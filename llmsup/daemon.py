"""The daemon: composition root. Lock, leftovers, stack, control socket, signals, end.

Started by `llmsup start` as `python -m llmsup.daemon --profile FILE`; it writes what it has to say
to stderr, which `llmsup start` points at the daemon's log. With `--foreground`, where stderr is a
terminal's or the journal's, the log gets it as well.
"""

import argparse
import asyncio
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from llmsup.announcer import Announcer
from llmsup.config.load import Loaded, load
from llmsup.config.paths import PRIVATE_UMASK, Paths, paths
from llmsup.control.api import app
from llmsup.control.command import daemon_argv, log_level
from llmsup.control.server import serve
from llmsup.errors import ConfigError, LlmsupError
from llmsup.host import choices, leftovers, shortage
from llmsup.host.daemon_log import LogToStderr, write_beside_stderr
from llmsup.host.lock import Lock
from llmsup.host.notify import Notifier, watchdog_period_s
from llmsup.host.process import reap
from llmsup.stack import SIGNALS, STOP_SIGNALS, Stack
from llmsup.troubles import Troubles

log = logging.getLogger("llmsup.daemon")

RELOAD_PATIENCE_S = 5.0
RELOAD_PAUSE_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; returns the exit status."""
    # It would end us before we listen. One that comes before is a reload after.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    if sys.stderr is not None:
        faulthandler.enable()  # the watchdog of systemd ends a daemon that is stuck by SIGABRT
    parser = argparse.ArgumentParser(prog="llmsup.daemon", description=__doc__)
    parser.add_argument("--profile", required=True, help="a profile's name or file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--lock-fd", type=int, help="the lock, inherited over an execve")
    parser.add_argument("--socket-fd", type=int, help="the control socket, inherited likewise")
    parser.add_argument("--activator-fd", type=int, help="the activator's socket, likewise")
    arguments = parser.parse_args(argv)
    try:
        troubles = Troubles()
        _log_to_stderr(log_level(os.environ), troubles)
        os.umask(PRIVATE_UMASK)
        shortage.raise_descriptor_limit()
        home = paths()
        home.create()
        write_beside_stderr(home.daemon_log, troubles)
        inherited = arguments.lock_fd
        lock = Lock.acquire(home.lock) if inherited is None else Lock.inherit(inherited)
        patience_s = 0.0 if inherited is None else RELOAD_PATIENCE_S
        try:
            loaded = _load(arguments.profile, arguments.overrides, home, patience_s)
        except ConfigError as error:
            loaded = _load_before(error, arguments.profile, home, patience_s)
        if inherited is None:
            with troubles.watched("what was switched to is not forgotten"):
                choices.note_started(home, loaded.path)
        inherited_fds = (arguments.socket_fd, arguments.activator_fd)
        asyncio.run(_run(loaded, home, troubles, lock, inherited_fds))
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


def _load(profile: str, overrides: Sequence[str], home: Paths, patience_s: float) -> Loaded:
    """The profile. With `patience_s` it was good a moment ago, and may be being written just now.

    Raises ConfigError.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return load(
                profile,
                environ=os.environ,
                overrides=overrides,
                config_dir=home.config,
                choices=choices.load(home.choices).usable,
            )
        except ConfigError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(RELOAD_PAUSE_S)


def _load_before(error: ConfigError, profile: str, home: Paths, patience_s: float) -> Loaded:
    """What ran before `profile`, which turned out to be bad as it was tried. Raises ConfigError."""
    trial = choices.peek(home.choices).trial
    if trial is None or trial.new != profile or not patience_s:
        raise error
    log.error("back to %s: %s", trial.old, error.message)
    with suppress(OSError):
        choices.note_failed(home.choices, error.message)
    return _load(trial.old, (), home, patience_s)


async def _run(
    loaded: Loaded,
    home: Paths,
    troubles: Troubles,
    lock: Lock,
    inherited_fds: tuple[int | None, int | None],
) -> None:
    """Keep the stack until it has stopped. Does not return where it is handed over.

    `inherited_fds`: of the control socket and of the activator's.
    """
    reap()
    is_heir = any(each is not None for each in inherited_fds)
    stack = Stack(loaded, home, os.environ, troubles, is_heir=is_heir)
    announcer = Announcer(Notifier(os.environ), stack.status)
    stack.on_change = announcer.note_change
    # First: who asked for anything meanwhile would meet services that nobody wants yet.
    await stack.prepare()
    _follow_signals(stack, announcer)
    shortage.bear(asyncio.get_running_loop())
    socket_fd, activator_fd = inherited_fds
    async with serve(app(stack), home.control_socket, socket_fd) as door:
        stack.begin()
        async with serve(
            stack.activator, stack.gateway.activator_socket, activator_fd
        ) as back_door:
            announcer.begin(watchdog_period_s(os.environ))
            log.info("up pid=%d profile=%s", os.getpid(), loaded.name)
            ends = [asyncio.create_task(each.wait()) for each in (stack.stopped, stack.handed_over)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if stack.handed_over.is_set():
                socket_fd, activator_fd = door.keep_over_exec(), back_door.keep_over_exec()
                stack.activator.hand_over()
    if stack.handed_over.is_set():
        log.info("handing over")
        announcer.note_reloading()
        _become_new_daemon(stack.heir, lock, socket_fd, activator_fd)
    await asyncio.to_thread(leftovers.end, home)
    log.info("stopped")


def _become_new_daemon(heir: tuple[str, Sequence[str]], lock: Lock, *sockets: int | None) -> None:
    """In place: the processes stay our children, the lock ours, and systemd's main process.

    Threads that are at work just now are not waited for: they end as they would by a SIGKILL,
    which every file and process of ours is made to bear.
    """
    argv = daemon_argv(*heir)
    socket_fd, activator_fd = sockets
    kept = [f"--socket-fd={socket_fd}", f"--activator-fd={activator_fd}"]
    command = [*argv, f"--lock-fd={lock.keep_over_exec()}", *kept]
    os.execv(command[0], command)  # noqa: S606 - no shell is meant


def _log_to_stderr(level: str, troubles: Troubles) -> None:
    logging.basicConfig(level=level, handlers=[LogToStderr(troubles)])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _follow_signals(stack: Stack, announcer: Announcer) -> None:
    """SIGTERM and SIGINT stop the stack, the second one without waiting for requests; SIGHUP
    reloads. One that comes while a new daemon takes over is left to it.
    """
    seen = 0
    reloads: set[asyncio.Task[None]] = set()

    def stop() -> None:
        nonlocal seen
        seen += 1
        stack.shut_down(now=seen > 1)
        announcer.note_change()

    def reload() -> None:
        if stack.handed_over.is_set():
            signal.raise_signal(signal.SIGHUP)
            return
        task = asyncio.create_task(_reload(stack, announcer))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


async def _reload(stack: Stack, announcer: Announcer) -> None:
    """What SIGHUP asks for. Where it is refused nothing changes, and the log says why."""
    announcer.note_reloading()
    try:
        await stack.reload()
    except LlmsupError as error:
        problems = error.message.splitlines()
        for problem in problems:
            log.error("not reloaded: %s", problem)
        announcer.note_refused(problems[0])
    except Exception:
        log.exception("not reloaded")
        announcer.note_refused("see the log")


if __name__ == "__main__":
    sys.exit(main())
