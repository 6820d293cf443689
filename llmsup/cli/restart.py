"""`llmsup restart`: services, or the daemon under them."""

import os
import time
from collections.abc import Sequence

from llmsup.cli import outcome, terminal
from llmsup.cli.wait import wait_ready, wait_replaced
from llmsup.config.load import load
from llmsup.config.paths import paths
from llmsup.control.client import Client
from llmsup.control.wire import Status
from llmsup.errors import LlmsupError
from llmsup.host import choices


def restart_daemon() -> None:
    """Have the daemon replaced by one of the version installed now; no service is touched."""
    home = paths()
    client = Client(home)
    daemon = client.status()["daemon"]
    # What the new daemon would refuse is refused while the old one is still there.
    load(
        daemon["profile_path"],
        environ=os.environ,
        overrides=daemon["overrides"],
        config_dir=home.config,
        choices=choices.peek(home.choices).usable,
    )
    asked_at = time.monotonic()
    client.hand_over()
    daemon = wait_replaced(home, asked_at)["daemon"]
    terminal.say(f"replaced: daemon pid {daemon['pid']}, version {daemon['version']}")


def restart(services: Sequence[str], *, now: bool) -> None:
    """Give these, or all that are wanted, a new process each; wait until they are ready."""
    began = time.monotonic()
    home = paths()
    client = Client(home)
    before = {info["service"]: info["generation"] for info in client.status()["services"]}
    changed = client.restart(tuple(dict.fromkeys(services)), now=now)["changed"]
    if not changed:
        raise LlmsupError("nothing is up", hint="llmsup start")
    first_generations = {name: before[name] + 1 for name in changed}

    def judge(status: Status) -> None:
        if words := outcome.unrestarted(status, first_generations):
            raise LlmsupError(words, hint="llmsup status shows it; llmsup restart tries again")

    interrupted = "the restart goes on: llmsup status shows it"
    status = wait_ready(home, first_generations, interrupted=interrupted, judge=judge)
    done = [
        info["service"]
        for info in status["services"]
        if info["generation"] >= first_generations.get(info["service"], info["generation"] + 1)
    ]
    terminal.say(f"restarted: {', '.join(done) or '-'} in {time.monotonic() - began:.1f} s")
