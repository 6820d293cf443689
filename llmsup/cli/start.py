"""`llmsup start`: the profile, the ports, the daemon, and then the wait for the services."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsup.cli import outcome, render, terminal
from llmsup.cli.spawn import spawn
from llmsup.cli.wait import reach, wait_daemon_gone, wait_ready
from llmsup.config.files import digest
from llmsup.config.load import Loaded, load
from llmsup.config.paths import Paths, paths
from llmsup.config.profiles import find
from llmsup.control.client import Client
from llmsup.control.command import daemon_argv, log_level
from llmsup.control.wire import DaemonInfo, ServiceInfo, Status
from llmsup.errors import LlmsupError
from llmsup.host import choices
from llmsup.preflight import load_startable

ANEW = "llmsup stop, then llmsup start"


def start(
    source: str | None, overrides: Sequence[str], *, wait: bool, timeout_s: float | None
) -> None:
    """Bring the stack up, with a daemon in the background; one that is up is completed.

    `source` is a profile's name or file; None: the stack that is up, else the default profile.
    """
    began = time.monotonic()
    home = paths()
    while True:
        status = _settled(home)
        if status is not None:
            _require_same(status["daemon"], source, overrides, home)
            _complete(home, wait=wait, timeout_s=timeout_s)
            return
        loaded = _loaded(source, overrides, home)
        home.create()
        status = spawn(daemon_argv(str(loaded.path), overrides), home)
        if status is not None:
            break
        # Another start was quicker: what it brought up may be what is asked for here.
    # A daemon that takes over leaves stopped what was stopped; who asks for a start wants it all.
    # In single mode what is stopped may be what the profile does not start: the daemon knows.
    if any(_was_stopped(info) for info in status["services"]):
        Client(home).start()
        status = Client(home).status()
    if wait:
        _wait_up(home, _wanted(status), timeout_s, began)
    else:
        terminal.say(f"starting: {loaded.name} · {render.address(status)}")


def _was_stopped(info: ServiceInfo) -> bool:
    return info["want"] == "down" and info["generation"] > 0


def start_in_foreground(source: str | None, overrides: Sequence[str]) -> None:
    """Become the daemon, with its log on stderr. Does not return."""
    home = paths()
    status = _settled(home)
    if status is not None:
        daemon = status["daemon"]
        raise LlmsupError(
            f"already up: {daemon['profile']} (daemon pid {daemon['pid']})", hint="llmsup stop"
        )
    argv = daemon_argv(str(_loaded(source, overrides, home).path), overrides)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # until the daemon listens to it
    os.execv(argv[0], argv)  # noqa: S606 - no shell is meant


def _settled(home: Paths) -> Status | None:
    """The stack that is up, or None; one that is stopping is waited for."""
    status = reach(home)
    if status is None or not status["daemon"]["stopping"]:
        return status
    terminal.say(f"{status['daemon']['profile']} is stopping")
    wait_daemon_gone(home)
    return reach(home)


def _loaded(source: str | None, overrides: Sequence[str], home: Paths) -> Loaded:
    """The profile, fit to be started. Raises ConfigError and UsageError."""
    log_level(os.environ)  # what the daemon would refuse is refused here
    source = source or choices.profile_meant(home, os.environ)
    return load_startable(source, environ=os.environ, overrides=overrides, home=home)


def _require_same(
    daemon: DaemonInfo, source: str | None, overrides: Sequence[str], home: Paths
) -> None:
    """Raise LlmsupError where something else than what is up is asked for.

    Raises ConfigError where that is a file with problems.
    """
    up, path = daemon["profile"], Path(daemon["profile_path"])
    if source is not None:
        asked = find(source, home.config)
        if asked.resolve() != path.resolve():
            if asked.stem != source:
                # A file that is pointed at is being worked on: its own problems come first. One
                # that goes by its name may be of another machine.
                load(asked, environ=os.environ, overrides=overrides, config_dir=home.config)
            other = asked.stem if asked.stem != up else str(asked)
            also = "" if overrides else f", or llmsup switch {source}"
            raise LlmsupError(f"{up} is up, not {other}", hint=f"llmsup stop first{also}")
    in_force = daemon["overrides"]
    is_asked_for = source is not None or overrides
    if is_asked_for and _by_key(overrides) != _by_key(in_force):
        options = " ".join(f"--set {text}" for text in in_force) or "no --set"
        raise LlmsupError(f"{up} is up with {options}", hint=ANEW)
    if daemon["profile_digest"] and digest(path) not in {"", daemon["profile_digest"]}:
        raise LlmsupError(f"{path} has changed since the start", hint="llmsup reload")


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    return {key.strip(): value for key, _, value in (text.partition("=") for text in overrides)}


def _complete(home: Paths, *, wait: bool, timeout_s: float | None) -> None:
    """Start what is not up of a stack whose daemon is."""
    began = time.monotonic()
    client = Client(home)
    before = {info["service"]: info["generation"] for info in client.status()["services"]}
    changed = client.start()["changed"]
    status = client.status()
    if not changed and not outcome.is_degraded(status):
        count = render.count(outcome.count_wanted(status), "service")
        terminal.say(f"already up: {status['daemon']['profile']}, {count}")
    elif wait:
        again = {name: before[name] + 1 for name in changed}
        _wait_up(home, {**_wanted(status), **again}, timeout_s, began)
    else:
        terminal.say(f"starting: {', '.join(changed) or 'nothing new'}")


def _wanted(status: Status) -> dict[str, int]:
    """Every service that is wanted, in any generation."""
    return {info["service"]: 0 for info in outcome.wanted(status)}


def _wait_up(
    home: Paths, first_generations: Mapping[str, int], timeout_s: float | None, began: float
) -> None:
    status = wait_ready(home, first_generations, timeout_s=timeout_s)
    count = render.count(outcome.count_wanted(status), "service")
    elapsed_s = time.monotonic() - began
    name = status["daemon"]["profile"]
    terminal.say(f"up: {name}, {count} ready in {elapsed_s:.1f} s · {render.address(status)}")
