"""`llmsup start`: the profile, the ports, the daemon, and then the wait for the services."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llmsup.cli import outcome, render, terminal
from llmsup.cli.wait import POLL_SOCKET_S, reach, wait_daemon_gone, wait_ready
from llmsup.config.listen import parse_listen
from llmsup.config.load import Loaded, load
from llmsup.config.paths import Paths, paths
from llmsup.config.profiles import default_name
from llmsup.config.schema import Profile, Qdrant
from llmsup.control.client import Client
from llmsup.control.wire import Status
from llmsup.errors import ConfigError, LlmsupError, NotRunningError, Problem, UnknownStateError
from llmsup.host import ports
from llmsup.host.leftovers import home_mark
from llmsup.host.process import marked

DAEMON_TIMEOUT_S = 30.0


def start(
    source: str | None, overrides: Sequence[str], *, wait: bool, timeout_s: float | None
) -> None:
    """Bring the stack up, with a daemon in the background; one that is up is completed.

    `source` is a profile's name or file; None: the stack that is up, else the default profile.
    """
    began = time.monotonic()
    home = paths()
    status = _settled(home)
    if status is not None:
        _require_same(status, source, overrides, home)
        _complete(home, wait=wait, timeout_s=timeout_s)
        return
    loaded = _loaded(source, overrides, home)
    home.create()
    status = _spawn(_daemon_argv(loaded, overrides), home)
    if wait:
        _wait_up(home, _wanted(status), timeout_s, began)
    else:
        terminal.say(f"starting: {loaded.name} · {render.address(status)}")


def start_in_foreground(source: str | None, overrides: Sequence[str]) -> None:
    """Become the daemon, with its log on stderr. Does not return."""
    home = paths()
    status = _settled(home)
    if status is not None:
        daemon = status["daemon"]
        raise LlmsupError(
            f"already up: {daemon['profile']} (daemon pid {daemon['pid']})", hint="llmsup stop"
        )
    argv = _daemon_argv(_loaded(source, overrides, home), overrides)
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
    """The profile without problems, its ports free. Raises ConfigError."""
    loaded = load(
        source or default_name(os.environ),
        environ=os.environ,
        overrides=overrides,
        config_dir=home.config,
    )
    # What a killed daemon left behind is ended by the next one.
    own = set(marked(home_mark(home)))
    problems = [
        Problem(str(loaded.path), key, f"port {port} is taken by {ports.describe(owner)}")
        for key, port in _ports(loaded.profile).items()
        for owner in ports.owners(port)
        if owner.pid not in own
    ]
    if problems:
        raise ConfigError(problems, hint="end what holds the port, or choose another one")
    return loaded


def _ports(profile: Profile) -> Mapping[str, int]:
    """The ports that the profile names, by their keys."""
    found = {"gateway.listen": parse_listen(profile.gateway.listen)[1]}
    for name, service in profile.service.items():
        if service.port is not None:
            found[f"service.{name}.port"] = service.port
        if isinstance(service, Qdrant):
            found[f"service.{name}.grpc_port"] = service.grpc_port
    return found


def _require_same(
    status: Status, source: str | None, overrides: Sequence[str], home: Paths
) -> None:
    """Raise LlmsupError where another profile than the one that is up is asked for."""
    up = status["daemon"]["profile"]
    if overrides:
        raise LlmsupError(
            f"{up} is up already: --set has no effect on it", hint="llmsup stop, then llmsup start"
        )
    if source is None:
        return
    asked = load(source, environ=os.environ, config_dir=home.config)
    if str(asked.path) != status["daemon"]["profile_path"]:
        other = asked.name if asked.name != up else str(asked.path)
        raise LlmsupError(f"{up} is up, not {other}", hint="llmsup stop first")


def _complete(home: Paths, *, wait: bool, timeout_s: float | None) -> None:
    """Start what is not up of a stack whose daemon is."""
    began = time.monotonic()
    client = Client(home)
    before = {info["service"]: info["generation"] for info in client.status()["services"]}
    changed = client.start()["changed"]
    status = client.status()
    if not changed and not outcome.is_degraded(status):
        count = render.count(len(outcome.wanted(status)), "service")
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
    status = wait_ready(Client(home), first_generations, timeout_s=timeout_s)
    count = render.count(len(outcome.wanted(status)), "service")
    elapsed_s = time.monotonic() - began
    name = status["daemon"]["profile"]
    terminal.say(f"up: {name}, {count} ready in {elapsed_s:.1f} s · {render.address(status)}")


def _daemon_argv(loaded: Loaded, overrides: Sequence[str]) -> list[str]:
    argv = [sys.executable, "-m", "llmsup.daemon", "--profile", str(loaded.path)]
    return argv + [word for override in overrides for word in ("--set", override)]


def _spawn(argv: Sequence[str], home: Paths) -> Status:
    """Start the daemon in a session of its own; returns its first answer."""
    with home.daemon_log.open("ab") as log:
        offset = log.tell()
        daemon = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + DAEMON_TIMEOUT_S
    while daemon.poll() is None:
        if home.control_socket.exists():
            # The socket may be that of an earlier daemon, not yet replaced.
            with suppress(NotRunningError, UnknownStateError):
                return Client(home).status()
        if time.monotonic() >= deadline:
            raise UnknownStateError(
                f"the daemon (pid {daemon.pid}) has not answered for {DAEMON_TIMEOUT_S:g} s",
                hint=f"see {home.daemon_log}",
            )
        time.sleep(POLL_SOCKET_S)
    raise LlmsupError(
        f"the daemon ended at once: {_last_words(home.daemon_log, offset)}",
        hint=f"see {home.daemon_log}",
    )


def _last_words(log: Path, offset: int) -> str:
    """The last error that the daemon wrote after `offset`, else its last line."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]
