"""The life of a service: one total table from (state, event) to what follows.

Rule 1: everything that decides the life of a service is in this file (with the arithmetic of
deaths in `backoff`). It is pure: `step(service, event, now) -> (service, actions)`; `now` is a
monotonic time in seconds and the actions are values that somebody else performs.

`Want` is what the operator asked; no crash changes it. `State` is what was observed. Only READY is
routable. Every spawn has a number, its generation; an event of another generation is stale and is
dropped in `step`, the one place. A service has at most one pending timer, and it is part of the
value: a timer that fires with another deadline than the pending one is stale, too.

Three traps that other supervisors fell into, and their rules here:
- an exit while STOPPING is not a death (it was asked for);
- a stop because the service did not get ready in time *is* one, counted when it is decided;
- deaths after readiness count towards the crash loop like any others.

The picture in docs/states.md is printed from RULES by `make docs`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmsup.config.units import duration
from llmsup.core import backoff
from llmsup.core.diagnosis import Cause
from llmsup.core.events import (
    Action,
    Adopted,
    BecameReady,
    BecameUnready,
    DependenciesChanged,
    Drain,
    Drained,
    Event,
    Exited,
    Hung,
    Kill,
    Postponed,
    ProbeFailed,
    Progressed,
    RestartAsked,
    Spawn,
    Spawned,
    SpawnFailed,
    StartAsked,
    StopAsked,
    Succeeded,
    Terminate,
    TimerElapsed,
)
from llmsup.core.service import Death, Service, State, Want

Step = tuple[Service, tuple[Action, ...]]
Rule = Callable[[Service, Any, float], Step]
"""What follows; each rule takes the events of its rows."""

STOPPED_ON_REQUEST = "stopped on request"
KILL_AGAIN_MIN_S = 1.0
SHORTAGE_RETRY_S = 2.0
NO_ROOM_RETRY_S = 60.0


# --- what can follow ----------------------------------------------------------------------------


def _ignore(service: Service, _event: Event, _now: float) -> Step:
    return service, ()


def _spawn_or_wait(service: Service, now: float) -> Step:
    """The one way into STARTING: a spawn where every dependency is ready, else a wait."""
    if service.missing:
        why = f"waits for {', '.join(service.missing)} to be ready"
        return replace(service, state=State.STOPPED, pid=None, timer_at=None, why=why), ()
    generation = service.generation + 1
    started = replace(
        service,
        state=State.STARTING,
        generation=generation,
        pid=None,
        probed="",
        started_at=now,
        timer_at=now + min(service.policy.stall_timeout_s, service.policy.start_timeout_s),
        restarts=service.restarts + (1 if service.deaths else 0),
    )
    return started, (Spawn(generation),)


def _terminate(service: Service, now: float) -> Step:
    stopping = replace(service, state=State.STOPPING, timer_at=now + service.policy.grace_period_s)
    return stopping, (Terminate(service.generation),)


def _kill(service: Service, now: float) -> Step:
    timer_at = now + _kill_again_after_s(service)
    stopping = replace(service, state=State.STOPPING, timer_at=timer_at)
    return stopping, (Kill(service.generation),)


def _kill_again_after_s(service: Service) -> float:
    return max(service.policy.grace_period_s, KILL_AGAIN_MIN_S)


def _count_death(service: Service, cause: Cause, reason: str, now: float) -> Service:
    """The one way a death is counted: whoever compares `death` before and after sees each."""
    deaths = backoff.record(service.deaths, now, service.policy.restart)
    death = Death(service.generation, now, cause, reason)
    return replace(service, deaths=deaths, death=death, why=reason)


def _recover(service: Service, now: float) -> Step:
    """What follows the deaths counted so far: a spawn now, a backoff, or giving up for a while."""
    restart = service.policy.restart
    gone = replace(service, pid=None, timer_at=None)
    if restart.policy == "never":
        why = f"{service.why}; its restart policy is never"
        return replace(gone, state=State.FAILED, why=why), ()
    if backoff.is_crash_loop(service.deaths, restart):
        why = (
            f"{service.why}; {_deaths(len(service.deaths))} within {duration(restart.window_s)}, "
            f"next try in {duration(restart.window_s)}"
        )
        return replace(gone, state=State.FAILED, why=why, timer_at=now + restart.window_s), ()
    seed = f"{service.name}:{service.generation}"
    due = max(service.deaths, default=now) + backoff.delay_s(service.deaths, restart, seed)
    if due <= now:
        return _spawn_or_wait(gone, now)
    why = f"{service.why}; next try after {duration(due - now)}"
    return replace(gone, state=State.BACKOFF, timer_at=due, why=why), ()


def _deaths(count: int) -> str:
    return "1 death" if count == 1 else f"{count} deaths"


def _give_up(service: Service) -> Step:
    why = f"{service.why}; not tried again before llmsup start"
    return replace(service, state=State.FAILED, pid=None, timer_at=None, why=why), ()


def _wait_out(service: Service, event: SpawnFailed, now: float) -> Step:
    """Try again soon. Nothing was started and nothing died, so nothing is counted.

    Room on the card may take hours to come, and who is told at once can do something about it.
    """
    is_room = event.cause is Cause.NO_ROOM
    waiting = replace(
        service,
        state=State.FAILED if is_room else State.BACKOFF,
        pid=None,
        restarts=service.restarts - (1 if service.deaths else 0),
        timer_at=now + (NO_ROOM_RETRY_S if is_room else SHORTAGE_RETRY_S),
        why=f"{event.reason}; tried again once there is room" if is_room else event.reason,
    )
    return waiting, ()


def _die(service: Service, event: Exited | SpawnFailed, now: float) -> Step:
    if isinstance(event, SpawnFailed) and event.shortage:
        return _wait_out(service, event, now)
    dead = _count_death(service, event.cause, event.reason, now)
    if event.permanent:
        return _give_up(dead)
    if isinstance(event, Exited) and event.remedied and service.policy.restart.policy != "never":
        # Each remedy makes the next launch smaller, so they come to an end by themselves.
        return _spawn_or_wait(replace(dead, pid=None, timer_at=None), now)
    return _recover(dead, now)


def _wanted(event: StopAsked | RestartAsked) -> Want:
    return Want.UP if isinstance(event, RestartAsked) else Want.DOWN


def _asked(want: Want) -> str:
    return "asked to restart" if want is Want.UP else "asked to stop"


# --- rules, by event ----------------------------------------------------------------------------


def _start(service: Service, event: StartAsked | RestartAsked, now: float) -> Step:
    if isinstance(event, StartAsked) and not event.forgive and service.deaths:
        why = "died under an earlier daemon"
        return _recover(replace(service, want=Want.UP, why=why), now)
    return _spawn_or_wait(replace(service, want=Want.UP, deaths=(), why=""), now)


def _want_up(service: Service, _event: Event, _now: float) -> Step:
    return replace(service, want=Want.UP), ()


def _stay_down(service: Service, _event: Event, _now: float) -> Step:
    down = replace(service, want=Want.DOWN, state=State.STOPPED, timer_at=None, deaths=())
    return replace(down, why=STOPPED_ON_REQUEST), ()


def _stop_unrouted(service: Service, event: StopAsked | RestartAsked, now: float) -> Step:
    """Stop or restart a process that never had traffic: nothing to drain."""
    want = _wanted(event)
    return _terminate(replace(service, want=want, deaths=(), why=_asked(want)), now)


def _stop_routed(service: Service, event: StopAsked | RestartAsked, now: float) -> Step:
    if not event.drain:
        return _stop_unrouted(service, event, now)
    want = _wanted(event)
    draining = replace(
        service,
        want=want,
        deaths=(),
        why=f"{_asked(want)}; requests in flight finish first",
        state=State.DRAINING,
        timer_at=now + service.policy.drain_timeout_s,
    )
    return draining, (Drain(service.generation),)


def _stop_draining(service: Service, event: StopAsked | RestartAsked, now: float) -> Step:
    """Asked again while draining: `drain` keeps it, without it the drain ends now."""
    want = _wanted(event)
    asked = replace(service, want=want, deaths=())
    if event.drain:
        return asked, ()
    return _terminate(replace(asked, why=f"{_asked(want)} without waiting for requests"), now)


def _stop_stopping(service: Service, event: StopAsked | RestartAsked, _now: float) -> Step:
    want = _wanted(event)
    return replace(service, want=want, deaths=(), why=_asked(want)), ()


def _note_missing(service: Service, event: DependenciesChanged, _now: float) -> Step:
    return replace(service, missing=event.missing), ()


def _unblock(service: Service, event: DependenciesChanged, now: float) -> Step:
    known = replace(service, missing=event.missing)
    return _spawn_or_wait(known, now) if service.want is Want.UP else (known, ())


def _adopt(service: Service, event: Adopted, now: float) -> Step:
    """The process of an earlier daemon is this service's: ready as soon as a probe says so."""
    policy = service.policy
    adopted = replace(
        service,
        want=Want.UP,
        state=State.STARTING,
        generation=event.as_generation,
        pid=event.pid,
        started_at=now,
        timer_at=now + min(policy.stall_timeout_s, policy.start_timeout_s),
        probed="",
        why="",
    )
    return adopted, ()


def _postpone(service: Service, event: Postponed, now: float) -> Step:
    """Its time limits are for a process: they begin once it may be spawned."""
    policy = service.policy
    waiting = replace(
        service,
        started_at=now,
        timer_at=now + min(policy.stall_timeout_s, policy.start_timeout_s),
        why=event.reason,
    )
    return waiting, ()


def _note_pid(service: Service, event: Spawned, _now: float) -> Step:
    return replace(service, pid=event.pid), ()


def _die_or_end(service: Service, event: Exited | SpawnFailed, now: float) -> Step:
    return _end_as_allowed(service, event) or _die(service, event, now)


def _end_as_allowed(service: Service, event: Exited | SpawnFailed) -> Step | None:
    """A clean exit under `on-failure` or `never` is the end of the job, not a death."""
    policy = service.policy.restart.policy
    if not (isinstance(event, Exited) and event.clean and policy != "always"):
        return None
    why = f"{event.reason}; its restart policy is {policy}"
    ended = replace(
        service, want=Want.DOWN, state=State.STOPPED, pid=None, timer_at=None, deaths=(), why=why
    )
    return ended, ()


def _note_probe(service: Service, event: ProbeFailed, _now: float) -> Step:
    return replace(service, probed=event.reason, why=event.reason), ()


def _become_ready(service: Service, _event: Event, _now: float) -> Step:
    return replace(service, state=State.READY, timer_at=None, why=""), ()


def _become_unready(service: Service, event: BecameUnready, _now: float) -> Step:
    return replace(service, state=State.UNREADY, why=event.reason), ()


def _extend_start(service: Service, _event: Event, now: float) -> Step:
    cap = service.started_at + service.policy.start_timeout_s
    return replace(service, timer_at=min(now + service.policy.stall_timeout_s, cap)), ()


def _stall(service: Service, _event: Event, now: float) -> Step:
    """Not ready in time: a death, counted here, though the process still has to be ended."""
    policy = service.policy
    if now - service.started_at >= policy.start_timeout_s:
        why = f"was not ready within {duration(policy.start_timeout_s)}"
    else:
        why = f"was not ready and showed no progress for {duration(policy.stall_timeout_s)}"
    why = f"{why}: {service.probed}" if service.probed else why
    return _terminate(_count_death(service, Cause.STALLED, why, now), now)


def _hang(service: Service, event: Hung, now: float) -> Step:
    """A death, counted here. Killed at once: what hangs is deaf to SIGTERM, too."""
    return _kill(_count_death(service, Cause.HUNG, event.reason, now), now)


def _hang_draining(service: Service, event: Hung, now: float) -> Step:
    return _kill(replace(service, why=f"{_asked(service.want)}; {event.reason}"), now)


def _succeed(service: Service, event: Succeeded, now: float) -> Step:
    """The old process is nobody's any more: what is told of it is stale from here on."""
    succeeded = replace(
        service,
        state=State.READY,
        generation=event.as_generation,
        pid=event.pid,
        started_at=now,
        timer_at=None,
        why="",
    )
    return succeeded, ()


def _succeed_wanted(service: Service, event: Succeeded, now: float) -> Step:
    """In the place of one that waits for its dependencies. A stop has the last word."""
    return _succeed(service, event, now) if service.want is Want.UP else (service, ())


def _end_drain(service: Service, event: Drained | TimerElapsed, now: float) -> Step:
    why = _asked(service.want)
    if isinstance(event, TimerElapsed):
        limit = duration(service.policy.drain_timeout_s)
        why = f"{why}; requests still in flight after {limit} were cut off"
    return _terminate(replace(service, why=why), now)


def _kill_again(service: Service, _event: Event, now: float) -> Step:
    grace_s = service.policy.grace_period_s
    late = f"did not exit within {duration(grace_s)}"
    why = service.why if service.why.endswith(late) else f"{service.why}; {late}"
    # The timer is set anew: a process stuck in the kernel is killed again until it is gone.
    killed = replace(service, timer_at=now + _kill_again_after_s(service), why=why)
    return killed, (Kill(service.generation),)


def _end_stop(service: Service, _event: Event, now: float) -> Step:
    """The exit that was asked for, by a stop, a restart or a stalled start."""
    if service.want is Want.DOWN:
        stopped = replace(service, state=State.STOPPED, pid=None, timer_at=None, deaths=())
        return replace(stopped, why=STOPPED_ON_REQUEST), ()
    # Without a death the stop was a restart's: no policy and no backoff stand in its way.
    return _recover(service, now) if service.deaths else _spawn_or_wait(service, now)


def _retry(service: Service, _event: Event, now: float) -> Step:
    return _spawn_or_wait(replace(service, why=""), now)


# --- the table ----------------------------------------------------------------------------------

RULES: dict[State, dict[type[Event], Rule]] = {
    State.STOPPED: {
        StartAsked: _start,
        StopAsked: _stay_down,
        RestartAsked: _start,
        DependenciesChanged: _unblock,
        Adopted: _adopt,
        Postponed: _ignore,
        Spawned: _ignore,
        SpawnFailed: _ignore,
        Exited: _ignore,
        ProbeFailed: _ignore,
        BecameReady: _ignore,
        BecameUnready: _ignore,
        Hung: _ignore,
        Succeeded: _succeed_wanted,
        Progressed: _ignore,
        Drained: _ignore,
        TimerElapsed: _ignore,
    },
    State.STARTING: {
        StartAsked: _want_up,
        StopAsked: _stop_unrouted,
        RestartAsked: _stop_unrouted,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _postpone,
        Spawned: _note_pid,
        SpawnFailed: _die_or_end,
        Exited: _die_or_end,
        ProbeFailed: _note_probe,
        BecameReady: _become_ready,
        BecameUnready: _ignore,
        Hung: _ignore,
        Succeeded: _succeed,
        Progressed: _extend_start,
        Drained: _ignore,
        TimerElapsed: _stall,
    },
    State.READY: {
        StartAsked: _want_up,
        StopAsked: _stop_routed,
        RestartAsked: _stop_routed,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _ignore,
        Spawned: _ignore,
        SpawnFailed: _ignore,
        Exited: _die_or_end,
        ProbeFailed: _ignore,
        BecameReady: _ignore,
        BecameUnready: _become_unready,
        Hung: _hang,
        Succeeded: _succeed,
        Progressed: _ignore,
        Drained: _ignore,
        TimerElapsed: _ignore,
    },
    State.UNREADY: {
        StartAsked: _want_up,
        StopAsked: _stop_routed,
        RestartAsked: _stop_routed,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _ignore,
        Spawned: _ignore,
        SpawnFailed: _ignore,
        Exited: _die_or_end,
        ProbeFailed: _ignore,
        BecameReady: _become_ready,
        BecameUnready: _become_unready,
        Hung: _hang,
        Succeeded: _succeed,
        Progressed: _ignore,
        Drained: _ignore,
        TimerElapsed: _ignore,
    },
    State.DRAINING: {
        StartAsked: _want_up,
        StopAsked: _stop_draining,
        RestartAsked: _stop_draining,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _ignore,
        Spawned: _ignore,
        SpawnFailed: _ignore,
        Exited: _end_stop,
        ProbeFailed: _ignore,
        BecameReady: _ignore,
        BecameUnready: _ignore,
        Hung: _hang_draining,
        Succeeded: _ignore,
        Progressed: _ignore,
        Drained: _end_drain,
        TimerElapsed: _end_drain,
    },
    State.STOPPING: {
        StartAsked: _want_up,
        StopAsked: _stop_stopping,
        RestartAsked: _stop_stopping,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _ignore,
        Spawned: _note_pid,
        SpawnFailed: _end_stop,
        Exited: _end_stop,
        ProbeFailed: _ignore,
        BecameReady: _ignore,
        BecameUnready: _ignore,
        Hung: _ignore,
        Succeeded: _ignore,
        Progressed: _ignore,
        Drained: _ignore,
        TimerElapsed: _kill_again,
    },
    State.BACKOFF: {
        StartAsked: _start,
        StopAsked: _stay_down,
        RestartAsked: _start,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _ignore,
        Spawned: _ignore,
        SpawnFailed: _ignore,
        Exited: _ignore,
        ProbeFailed: _ignore,
        BecameReady: _ignore,
        BecameUnready: _ignore,
        Hung: _ignore,
        Succeeded: _succeed,
        Progressed: _ignore,
        Drained: _ignore,
        TimerElapsed: _retry,
    },
    State.FAILED: {
        StartAsked: _start,
        StopAsked: _stay_down,
        RestartAsked: _start,
        DependenciesChanged: _note_missing,
        Adopted: _ignore,
        Postponed: _ignore,
        Spawned: _ignore,
        SpawnFailed: _ignore,
        Exited: _ignore,
        ProbeFailed: _ignore,
        BecameReady: _ignore,
        BecameUnready: _ignore,
        Hung: _ignore,
        Succeeded: _succeed,
        Progressed: _ignore,
        Drained: _ignore,
        TimerElapsed: _retry,
    },
}
"""What follows each event in each state. Total: ignored pairs are spelled out, too."""


def step(service: Service, event: Event, now: float) -> Step:
    """The service after `event` at monotonic time `now`, and what must be done about it.

    Events of an older generation and timers that are no longer pending change nothing.
    """
    generation = getattr(event, "generation", service.generation)
    if generation != service.generation:
        return service, ()
    if isinstance(event, TimerElapsed) and event.at != service.timer_at:
        return service, ()
    return RULES[service.state][type(event)](service, event, now)
