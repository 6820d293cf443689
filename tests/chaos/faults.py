"""Which faults a chaos run inflicts: pure, so that a seed is the whole run.

A fault is a value. What it excuses is told here, too: the one place that says which requests may
fail for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random

GATEWAY, DAEMON = "gateway", "daemon"
SERVERS = ("a", "b", "lone")
EXTRA = "extra"
ROUTES: Mapping[str, tuple[str, ...]] = {"ab": ("a", "b"), "ba": ("b", "a"), "lone": ("lone",)}
"""The routes under load; nobody asks for that of `extra`."""


@dataclass(frozen=True)
class Shape:
    """What the profile says at one time: a revision of each launch; `extra` comes and goes."""

    revisions: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SERVERS, 0))
    has_extra: bool = False

    @property
    def services(self) -> tuple[str, ...]:
        return (*SERVERS, EXTRA) if self.has_extra else SERVERS

    @property
    def routes(self) -> Mapping[str, tuple[str, ...]]:
        return {**ROUTES, EXTRA: (EXTRA,)} if self.has_extra else ROUTES


class Theft(Enum):
    """How a stranger holds a port."""

    LISTENS = "listens"
    SHARES = "listens with SO_REUSEPORT"


@dataclass(frozen=True)
class Kill:
    """SIGKILL of all victims at once. A killed daemon is started again after `pause_s`."""

    victims: tuple[str, ...]
    pause_s: float


@dataclass(frozen=True)
class Freeze:
    """SIGSTOP of a server, and SIGCONT after `for_s` if it is still there."""

    victim: str
    for_s: float


@dataclass(frozen=True)
class Steal:
    """A server dies, and a stranger is on its port before the daemon is, for `for_s`."""

    victim: str
    how: Theft
    for_s: float


@dataclass(frozen=True)
class Reload:
    """The profile is another one, and the daemon is told."""

    shape: Shape
    changed: tuple[str, ...]


Fault = Kill | Freeze | Steal | Reload


def faults(seed: int) -> Iterator[Fault]:
    """An endless sequence; the same for the same seed."""
    random = Random(seed)
    shape = Shape()
    while True:
        match random.choices(
            ("one", "some", "all", "freeze", "steal", "reload"), (7, 3, 1, 3, 3, 3)
        ):
            case ["one"]:
                victim = random.choice((*SERVERS, GATEWAY, DAEMON))
                yield Kill((victim,), round(random.uniform(0, 1), 2))
            case ["some"]:
                victims = random.sample((*SERVERS, GATEWAY, DAEMON), random.randint(2, 4))
                yield Kill(tuple(sorted(victims)), round(random.uniform(0, 1), 2))
            case ["all"]:
                yield Kill((*SERVERS, GATEWAY, DAEMON), round(random.uniform(0, 1), 2))
            case ["freeze"]:
                yield Freeze(random.choice(SERVERS), round(random.uniform(0.1, 3), 2))
            case ["steal"]:
                how = random.choice(tuple(Theft))
                yield Steal(random.choice(SERVERS), how, round(random.uniform(0.1, 2), 2))
            case ["reload"]:
                fault = _reload(random, shape)
                shape = fault.shape
                yield fault


def _reload(random: Random, shape: Shape) -> Reload:
    """Some launches changed, `extra` added or removed, both, or neither."""
    changed = tuple(sorted(random.sample(SERVERS, random.choice((0, 1, 1, 2)))))
    revisions = {name: number + (name in changed) for name, number in shape.revisions.items()}
    has_extra = shape.has_extra != random.choice((True, False))
    return Reload(replace(shape, revisions=revisions, has_extra=has_extra), changed)


def may_be_unavailable(fault: Fault, route: str) -> bool:
    """Whether every upstream of the route was down for a while: an honest 503 is right then."""
    services = set(ROUTES[route])
    match fault:
        case Kill(victims):
            return services <= set(victims)
        case Freeze(victim) | Steal(victim):
            return services == {victim}
        case Reload(_, changed):  # one after another: never two of a route
            return len(services) == 1 and services <= set(changed)


def takes_gateway(fault: Fault) -> bool:
    """Whether connections may break until the gateway serves again."""
    return isinstance(fault, Kill) and GATEWAY in fault.victims
