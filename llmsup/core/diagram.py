"""Walks the lifecycle table, for the tests and for the picture in docs/states.md.

The walk tries every kind of event, in every variant that matters, on every reachable service, so
the picture cannot disagree with the code.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from llmsup.config.schema import Restart
from llmsup.core.diagnosis import Cause
from llmsup.core.events import (
    EVENTS,
    Adopted,
    BecameReady,
    BecameUnready,
    DependenciesChanged,
    Drained,
    Event,
    Exited,
    Hung,
    Postponed,
    ProbeFailed,
    Progressed,
    RestartAsked,
    Spawned,
    SpawnFailed,
    StartAsked,
    StopAsked,
    Succeeded,
    TimerElapsed,
)
from llmsup.core.lifecycle import step
from llmsup.core.service import Policy, Service, State

Edge = tuple[Service, Event, Service]
POLICIES = tuple(
    Policy(restart=Restart(policy=policy, max_deaths=3))
    for policy in ("always", "on-failure", "never")
)


def variants(service: Service) -> tuple[Event, ...]:
    """Every event that could reach `service` now, each kind in each variant that matters."""
    generation = service.generation
    timer = () if service.timer_at is None else (TimerElapsed(service.timer_at),)
    return (
        StartAsked(),
        StartAsked(forgive=False),
        StopAsked(drain=True),
        StopAsked(drain=False),
        RestartAsked(drain=True),
        RestartAsked(drain=False),
        DependenciesChanged(()),
        DependenciesChanged(("qdrant",)),
        Adopted(generation + 1, 4712),
        Postponed(generation, "waits for the card"),
        Postponed(generation, ""),
        Spawned(generation, 4711),
        SpawnFailed(generation, "no such file", permanent=True),
        SpawnFailed(generation, "no memory"),
        SpawnFailed(generation, "no descriptors", shortage=True),
        SpawnFailed(generation, "no room", shortage=True, cause=Cause.NO_ROOM),
        Exited(generation, "exited with status 0", clean=True),
        Exited(generation, "killed by SIGKILL"),
        Exited(generation, "no such model", permanent=True),
        Exited(generation, "out of GPU memory", remedied=True),
        ProbeFailed(generation, "loading the model"),
        BecameReady(generation),
        BecameUnready(generation, "no answer"),
        Hung(generation, "nothing moved for 30s"),
        Succeeded(generation + 1, 4713),
        Progressed(generation),
        Drained(generation),
        *timer,
    )


def walk(policy: Policy) -> Iterator[Edge]:
    """Every step that can happen to a service of this policy, up to times and numbers."""
    first = Service("chat", policy)
    seen = {_essence(first)}
    queue = deque([(first, 0.0)])
    while queue:
        service, now = queue.popleft()
        for event in variants(service):
            at = event.at if isinstance(event, TimerElapsed) else now + 0.1
            after, _actions = step(service, event, at)
            yield service, event, after
            if _essence(after) not in seen:
                seen.add(_essence(after))
                queue.append((after, at))


def _essence(service: Service) -> Service:
    """The service without what may grow for ever: two equal ones go on alike."""
    return replace(
        service,
        generation=min(service.generation, 1),
        deaths=tuple(0.0 for _ in service.deaths),
        timer_at=None if service.timer_at is None else 0.0,
        pid=None if service.pid is None else 1,
        started_at=0.0,
        restarts=0,
        death=None,
        why="",
    )


def transitions() -> dict[tuple[State, State], list[str]]:
    """For each pair of different states, the names of the events that lead over, in table order."""
    found: dict[tuple[State, State], set[str]] = {}
    for policy in POLICIES:
        for before, event, after in walk(policy):
            if before.state is not after.state:
                pair = (before.state, after.state)
                found.setdefault(pair, set()).add(type(event).__name__)
    order = [kind.__name__ for kind in EVENTS]
    states = list(State)
    return {
        pair: sorted(names, key=order.index)
        for pair, names in sorted(
            found.items(), key=lambda item: tuple(states.index(state) for state in item[0])
        )
    }


def mermaid() -> str:
    """The state diagram, as Mermaid text."""
    lines = ["stateDiagram-v2", "    [*] --> stopped"]
    lines += [
        f"    {before.value} --> {after.value}: {', '.join(names)}"
        for (before, after), names in transitions().items()
    ]
    return "\n".join(lines) + "\n"
