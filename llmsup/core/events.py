"""What happens to a service (events, past tense) and what is to be done (actions, imperative).

An event or action about a process carries its generation: the number of the spawn.
"""

from dataclasses import dataclass

from llmsup.core.diagnosis import Cause

# --- events -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartAsked:
    """The service is wanted up; one that is there is left alone.

    `forgive`: past deaths are forgotten. A new daemon that only goes on does not forgive.
    """

    forgive: bool = True


@dataclass(frozen=True)
class StopAsked:
    """The operator wants the service down; `drain` lets requests in flight finish first."""

    drain: bool = True


@dataclass(frozen=True)
class RestartAsked:
    """The operator wants a new process; past deaths are forgiven."""

    drain: bool = True


@dataclass(frozen=True)
class DependenciesChanged:
    """The dependencies that are not ready are now `missing`."""

    missing: tuple[str, ...]


@dataclass(frozen=True)
class Adopted:
    """A process that an earlier daemon started is alive; it was that one's `as_generation`."""

    as_generation: int
    pid: int


@dataclass(frozen=True)
class Postponed:
    """The spawn has to wait, for the card, say; without a `reason` it has to no longer."""

    generation: int
    reason: str


@dataclass(frozen=True)
class Spawned:
    """The process of this generation exists."""

    generation: int
    pid: int


@dataclass(frozen=True)
class SpawnFailed:
    """There is no process; `permanent` says that trying again unchanged is useless.

    `shortage`: of descriptors, or of room on the card. It is waited out, and is no death.
    """

    generation: int
    reason: str
    permanent: bool = False
    shortage: bool = False
    cause: Cause = Cause.LAUNCH


@dataclass(frozen=True)
class Exited:
    """The process is gone; `clean` is exit status 0, `permanent` as in SpawnFailed.

    `remedied`: the next launch is another one, which is not expected to die of the same cause.
    """

    generation: int
    reason: str
    clean: bool = False
    permanent: bool = False
    remedied: bool = False
    cause: Cause = Cause.UNKNOWN


@dataclass(frozen=True)
class ProbeFailed:
    """A process that has not been ready yet was probed in vain; posted when the reason changes."""

    generation: int
    reason: str


@dataclass(frozen=True)
class BecameReady:
    """The readiness threshold was reached."""

    generation: int


@dataclass(frozen=True)
class BecameUnready:
    """The failure threshold was reached."""

    generation: int
    reason: str


@dataclass(frozen=True)
class Hung:
    """Work was pending and nothing moved for as long as the service may stand still."""

    generation: int
    reason: str


@dataclass(frozen=True)
class Succeeded:
    """A process that was started beside this one serves in its place, as `as_generation`."""

    as_generation: int
    pid: int


@dataclass(frozen=True)
class Progressed:
    """A starting process was seen to do something: it logged, read or grew."""

    generation: int


@dataclass(frozen=True)
class Drained:
    """No request is in flight any more."""

    generation: int


@dataclass(frozen=True)
class TimerElapsed:
    """The timer that was set for `at` went off."""

    at: float


Event = (
    StartAsked
    | StopAsked
    | RestartAsked
    | DependenciesChanged
    | Adopted
    | Postponed
    | Spawned
    | SpawnFailed
    | Exited
    | ProbeFailed
    | BecameReady
    | BecameUnready
    | Hung
    | Succeeded
    | Progressed
    | Drained
    | TimerElapsed
)
EVENTS: tuple[type[Event], ...] = (
    StartAsked,
    StopAsked,
    RestartAsked,
    DependenciesChanged,
    Adopted,
    Postponed,
    Spawned,
    SpawnFailed,
    Exited,
    ProbeFailed,
    BecameReady,
    BecameUnready,
    Hung,
    Succeeded,
    Progressed,
    Drained,
    TimerElapsed,
)


# --- actions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spawn:
    """Start a process; answer with Spawned or SpawnFailed."""

    generation: int


@dataclass(frozen=True)
class Drain:
    """Watch the requests in flight; answer with Drained."""

    generation: int


@dataclass(frozen=True)
class Terminate:
    """SIGTERM (and SIGCONT) to the process group."""

    generation: int


@dataclass(frozen=True)
class Kill:
    """SIGKILL to the process group."""

    generation: int


Action = Spawn | Drain | Terminate | Kill
