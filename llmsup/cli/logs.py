"""`llmsup logs`: the files themselves, so it works with no daemon."""

from pathlib import Path

from llmsup.cli import terminal
from llmsup.config.paths import Paths, paths
from llmsup.errors import UsageError
from llmsup.host import logfile

DAEMON = "daemon"
FOLLOW_POLL_S = 0.2


def logs(service: str, *, lines: int, follow: bool) -> None:
    """Show the last lines of a service's output, or of the daemon's own log; then what follows."""
    path = _log(paths(), service)
    if follow:
        for line in logfile.follow(path, poll_s=FOLLOW_POLL_S, lines=lines):
            terminal.show(line)
    elif found := logfile.tail(path, lines):
        terminal.show("\n".join(found))
    elif lines:
        terminal.say("nothing yet")


def known(home: Paths) -> dict[str, Path]:
    """The logs that are there, by whose they are."""
    found = {_service(path): path for path in home.logs.glob(_pattern(home))}
    if home.daemon_log.exists():
        found[DAEMON] = home.daemon_log
    return found


def _log(home: Paths, service: str) -> Path:
    # Compared with the names of files that are there: a name is never made into a path.
    found = known(home)
    if service not in found:
        raise UsageError(
            f"no log of {service!r}",
            hint=f"there are logs of: {', '.join(sorted(found))}" if found else "llmsup start",
        )
    return found[service]


def _pattern(home: Paths) -> str:
    return home.service_log("*").name


def _service(log: Path) -> str:
    return log.name.partition(".")[0]
