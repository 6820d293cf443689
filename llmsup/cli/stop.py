"""`llmsup stop` and `llmsup restart`."""

import time
from collections.abc import Sequence

from llmsup.cli import outcome, render, terminal
from llmsup.cli.wait import reach, wait_daemon_gone, wait_ready, wait_stopped
from llmsup.config.paths import Paths, paths
from llmsup.control.client import Client
from llmsup.host import leftovers
from llmsup.host.lock import Lock


def stop_stack(*, now: bool) -> None:
    """End the stack and its daemon; where there is none, what a killed one left behind."""
    home = paths()
    status = reach(home)
    if status is None:
        _end_leftovers(home)
        return
    count = len(outcome.wanted(status))
    Client(home).shut_down(now=now)
    wait_daemon_gone(home)
    name = status["daemon"]["profile"]
    terminal.say(f"stopped: {name} ({render.count(count, 'service')})")


def stop_services(services: Sequence[str], *, now: bool) -> None:
    """Stop these and wait until they are."""
    client = Client(paths())
    changed = client.stop(services, now=now)["changed"]
    if not changed:
        terminal.say(f"already stopped: {', '.join(services)}")
        return
    wait_stopped(client, changed)
    terminal.say(f"stopped: {', '.join(services)}")


def restart(services: Sequence[str], *, now: bool) -> None:
    """Give these, or all that are wanted, a new process each; wait until they are ready."""
    began = time.monotonic()
    client = Client(paths())
    before = {info["service"]: info["generation"] for info in client.status()["services"]}
    changed = client.restart(services, now=now)["changed"]
    wait_ready(client, {name: before[name] + 1 for name in changed})
    terminal.say(f"restarted: {', '.join(changed)} in {time.monotonic() - began:.1f} s")


def _end_leftovers(home: Paths) -> None:
    home.create()
    # Held until we exit, so that none of the processes belongs to a daemon that is just starting.
    Lock.acquire(home.lock)
    ended = leftovers.end(home)
    if ended:
        terminal.say(f"ended {render.count(ended, 'process')} that a killed daemon had left")
    else:
        terminal.say("not up")
