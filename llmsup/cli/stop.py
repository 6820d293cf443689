"""`llmsup stop`."""

import shutil
from collections.abc import Sequence

from llmsup.cli import outcome, render, terminal
from llmsup.cli.wait import end_unreachable, reach, wait_daemon_gone, wait_stopped
from llmsup.config.files import exists
from llmsup.config.paths import Paths, paths
from llmsup.control.client import Client, NoSocketError
from llmsup.errors import LlmsupError
from llmsup.host import leftovers
from llmsup.host.lock import Lock
from llmsup.host.process import marked


def stop_stack(*, now: bool) -> None:
    """End the stack and its daemon; where there is none, what a killed one left behind."""
    home = paths()
    try:
        status = reach(home)
    except NoSocketError:
        if not end_unreachable(home, now=now):
            raise
        terminal.say("stopped")
        return
    if status is None:
        _end_leftovers(home)
        return
    Client(home).shut_down(now=now)
    wait_daemon_gone(home)
    name, count = status["daemon"]["profile"], outcome.count_up(status)
    terminal.say(f"stopped: {name} ({render.count(count, 'service')})")


def stop_services(services: Sequence[str], *, now: bool) -> None:
    """Stop these and wait until they are. Raises LlmsupError where one is started again."""
    client = Client(paths())
    names = tuple(dict.fromkeys(services))
    before = {info["service"]: info["generation"] for info in client.status()["services"]}
    changed = client.stop(names, now=now)["changed"]
    if not changed:
        terminal.say(f"already stopped: {', '.join(names)}")
        return
    again = wait_stopped(client, {name: before[name] for name in changed})
    if again:
        were = "was" if len(again) == 1 else "were"
        raise LlmsupError(
            f"{', '.join(again)} {were} started again meanwhile", hint="llmsup status shows it"
        )
    terminal.say(f"stopped: {', '.join(names)}")


def _end_leftovers(home: Paths) -> None:
    """What a killed daemon left: processes, and files that say that it is there."""
    left = marked(leftovers.home_mark(home))
    files = (home.control_socket, home.gateway, home.slots)
    if not left and not any(map(exists, files)):
        terminal.say("not up")
        return
    try:
        # Held until we exit, so that nothing of it belongs to a daemon that is just starting.
        Lock.acquire(home.lock)
    except LlmsupError:
        if left:
            raise
        terminal.say("not up")
        return
    ended = leftovers.end(home)
    shutil.rmtree(home.gateway, ignore_errors=True)
    home.control_socket.unlink(missing_ok=True)
    if ended:
        terminal.say(f"ended {render.count(ended, 'process')} that a killed daemon had left")
    else:
        terminal.say("not up")
