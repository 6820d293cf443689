"""`llmsup why`: the crash bundles themselves, so it works with no daemon."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import cast

from llmsup.cli import deaths, terminal
from llmsup.cli.logs import DAEMON
from llmsup.cli.logs import known as known_logs
from llmsup.config.paths import Paths, paths
from llmsup.control.client import Client
from llmsup.control.wire import DeathInfo, KeptDeath, ServiceInfo
from llmsup.errors import NotRunningError, UnknownStateError, UsageError
from llmsup.host import bundles
from llmsup.host.bundles import Bundle

DEATH_MAX_BYTES = 4 * 1024 * 1024


def why(service: str, *, last: int, as_json: bool) -> None:
    """Show how a service is now, and its last deaths."""
    home = paths()
    present = _present(home)
    kept = bundles.found(home.crashes)
    known = {*present, *(each.service for each in kept), *known_logs(home)} - {DAEMON}
    if service not in known:
        raise UsageError(
            f"unknown service: {service}",
            hint=f"known services: {', '.join(sorted(known))}" if known else "llmsup start",
        )
    ours = [each for each in kept if each.service == service]
    shown = list(_read(ours[:last]))
    if as_json:
        info = present.get(service)
        terminal.show_json({"service": service, "present": info, "deaths": shown})
        return
    text = deaths.account(
        service,
        present.get(service),
        shown,
        len(ours),
        width=terminal.width(sys.stdout),
        colour=terminal.has_colour(sys.stdout),
    )
    terminal.show(text)


def known(home: Paths) -> list[str]:
    """The services that something is known of, without asking the daemon."""
    names = {each.service for each in bundles.found(home.crashes)}
    return sorted({*names, *known_logs(home)} - {DAEMON})


def _present(home: Paths) -> dict[str, ServiceInfo]:
    """The services of the daemon that is up, by name; the past is told without it, too."""
    try:
        return {info["service"]: info for info in Client(home).status()["services"]}
    except NotRunningError:
        return {}
    except UnknownStateError as error:
        terminal.say(f"{error.message}: how it is now is not known")
        return {}


def _read(found: Sequence[Bundle]) -> Iterator[KeptDeath]:
    for bundle in found:
        try:
            with (bundle.path / bundles.DEATH).open("rb") as file:
                info = json.loads(file.read(DEATH_MAX_BYTES))
            output = (bundle.path / bundles.OUTPUT).read_text(errors="replace").splitlines()
            if not (isinstance(info, dict) and info.keys() >= DeathInfo.__required_keys__):
                raise ValueError(f"no death as this version of llmsup writes it in {bundles.DEATH}")
            yield cast("KeptDeath", {**info, "bundle": str(bundle.path), "output": output})
        except (OSError, ValueError, RecursionError) as error:
            terminal.say(f"{bundle.path} cannot be read: {error}")
