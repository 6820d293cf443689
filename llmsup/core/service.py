"""A service as it is: what is wanted, what was observed, and what is known of it."""

from dataclasses import dataclass, field
from enum import Enum

from llmsup.config.schema import Restart
from llmsup.core import backoff
from llmsup.core.diagnosis import Cause


class Want(Enum):
    """What the operator asked for."""

    UP = "up"
    DOWN = "down"


class State(Enum):
    """What was observed."""

    STOPPED = "stopped"  # no process; with Want.UP it waits for its dependencies
    STARTING = "starting"  # a process that has not been ready yet
    READY = "ready"  # may receive traffic
    UNREADY = "unready"  # was ready; its probes fail
    DRAINING = "draining"  # off the upstream lists; requests in flight finish
    STOPPING = "stopping"  # SIGTERM was sent; SIGKILL follows after the grace period
    BACKOFF = "backoff"  # died; waits before the next spawn
    FAILED = "failed"  # gave up; a slow retry or a person brings it back


ALIVE = frozenset({State.STARTING, State.READY, State.UNREADY, State.DRAINING, State.STOPPING})
"""The states in which a process exists."""


@dataclass(frozen=True)
class Policy:
    """The times and limits of one service, in seconds, taken from its profile."""

    restart: Restart = field(default_factory=Restart)
    stall_timeout_s: float = 60.0
    start_timeout_s: float = 1800.0
    drain_timeout_s: float = 30.0
    grace_period_s: float = 10.0


@dataclass(frozen=True)
class Death:
    """An end that nobody asked for, as it was counted at monotonic time `at`."""

    generation: int
    at: float
    cause: Cause
    reason: str


@dataclass(frozen=True)
class Service:
    """One service as it is now. Only `step` makes a changed one.

    `why` is the sentence a person reads in `status`; empty while there is nothing to explain.
    `timer_at` and `started_at` are monotonic seconds. `missing` names the dependencies that are
    not ready. `restarts` counts those that nobody asked for. `probed` is what the last probe found
    while this generation started. `death` is the last one; no forgiving undoes it.
    """

    name: str
    policy: Policy = field(default_factory=Policy)
    want: Want = Want.DOWN
    state: State = State.STOPPED
    generation: int = 0
    pid: int | None = None
    started_at: float = 0.0
    timer_at: float | None = None
    deaths: backoff.Deaths = ()
    death: Death | None = None
    restarts: int = 0
    missing: tuple[str, ...] = ()
    probed: str = ""
    why: str = "not started"

    @property
    def is_down(self) -> bool:
        """Whether nobody wants it and nothing is there."""
        return self.want is Want.DOWN and self.state is State.STOPPED
