"""The scenarios: what each breaks, what must hold, and how a person does the same by hand."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llmsup.drill import planes, servers
from llmsup.drill.ground import Ground
from llmsup.drill.report import Broken
from llmsup.units import GATEWAY

PID = "$(llmsup status --json | jq -r '.services[] | select(.service == \"{}\").pid')"
DAEMON_PID = "$(llmsup status --json | jq -r .daemon.pid)"


def _never(_ground: Ground) -> str:
    return ""


def _lone(ground: Ground) -> str:
    """Why requests would wait while the first server is away, or fail."""
    if ground.has_fallback:
        return ""
    return f"only {ground.first} answers {ground.route}, so requests would wait; name it to see how"


@dataclass(frozen=True)
class Scenario:
    """One way to break the stack.

    `why_not` says why it would tell nothing on this stack; `why_not_unasked` why it is left out
    unless it is named. Both are empty where there is no reason. `by_hand` are shell commands with
    {first} for the server, {its_pid} for its process, {gateway_pid} and {daemon_pid}.
    """

    name: str
    breaks: str
    bound: str
    run: Callable[[Ground], Awaitable[Broken]]
    by_hand: tuple[str, ...]
    why_not: Callable[[Ground], str] = _never
    why_not_unasked: Callable[[Ground], str] = _never

    def commands(self, ground: Ground) -> list[str]:
        """What a person types to see the same on this stack."""
        words = {
            "first": ground.first,
            "its_pid": PID.format(ground.first),
            "gateway_pid": PID.format(GATEWAY),
            "daemon_pid": DAEMON_PID,
            "profile": ground.status["daemon"]["profile_path"],
            "limit_s": f"{servers.liveness_s(ground):g}",
        }
        return [each.format(**words) for each in self.by_hand]


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "load",
        "nothing: ten chat requests at once",
        "ten of ten are answered",
        servers.load,
        ("seq 10 | xargs -P 10 -I N ./ask        # ask: see Traffic",),
    ),
    Scenario(
        "kill",
        "SIGKILL to the server that the route prefers",
        "no request fails while another service of the route answers; the server is ready again",
        servers.kill,
        ("kill -9 {its_pid}", "llmsup events -f"),
        why_not_unasked=_lone,
    ),
    Scenario(
        "hang",
        "SIGSTOP to the server that the route prefers: alive, and answering nothing",
        "replaced within its liveness timeout and 10 s; what waited is answered elsewhere",
        servers.hang,
        ("kill -STOP {its_pid}", "llmsup events -f    # replaced within {limit_s} s and a look"),
        why_not=servers.why_no_hang,
        why_not_unasked=_lone,
    ),
    Scenario(
        "daemon",
        "SIGKILL to the daemon, and a new one a second later",
        "no request fails, and the new daemon keeps every process",
        planes.daemon,
        ("kill -9 {daemon_pid}", "llmsup start {profile}", "llmsup status    # the same pids"),
        why_not=planes.why_no_daemon,
    ),
    Scenario(
        "gateway",
        "SIGKILL to Envoy, through which every request goes",
        "serves again within 300 ms; what is refused or reset until then is counted, not hidden",
        planes.gateway,
        ("kill -9 {gateway_pid}",),
    ),
    Scenario(
        "disk",
        "every write of the daemon to a file, by a limit of 0 bytes (nothing is filled); a server "
        "is stopped and started meanwhile",
        "no request fails, the daemon goes on, and writes what it missed once it can",
        planes.disk,
        (
            "pid={daemon_pid}",
            "prlimit --pid $pid --fsize=0:",
            "llmsup stop {first} --now",
            "prlimit --pid $pid --fsize=unlimited:",
            "llmsup start {profile}",
        ),
        why_not_unasked=_lone,
    ),
    Scenario(
        "crashloop",
        "SIGKILL to each new process of the server that the route prefers",
        "given up after max_deaths, with the reason; the route goes on; a start brings it back",
        servers.crashloop,
        ("while kill -9 {its_pid}; do sleep 0.1; done", "llmsup status", "llmsup start {profile}"),
        why_not=servers.why_no_crashloop,
        why_not_unasked=_lone,
    ),
)
"""In the order in which they are run: what leaves most behind comes last."""

NAMES: tuple[str, ...] = tuple(scenario.name for scenario in SCENARIOS)
