"""The lifecycle table: walked whole, then its rules one by one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsup.config.schema import Restart
from llmsup.core import diagram
from llmsup.core.diagnosis import Cause
from llmsup.core.events import (
    EVENTS,
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
from llmsup.core.lifecycle import NO_ROOM_RETRY_S, RULES, SHORTAGE_RETRY_S, step
from llmsup.core.service import ALIVE, Policy, Service, State, Want

POLICY = Policy(
    restart=Restart(backoff_s=1.0, max_backoff_s=8.0, max_deaths=4, window_s=100.0),
    stall_timeout_s=10.0,
    start_timeout_s=30.0,
    drain_timeout_s=5.0,
    grace_period_s=2.0,
)


def after(*timed_events: tuple[float, Event], policy: Policy = POLICY) -> Service:
    service = Service("chat", policy)
    for now, event in timed_events:
        service, _actions = step(service, event, now)
    return service


def ready(policy: Policy = POLICY) -> Service:
    return after((0.0, StartAsked()), (0.0, Spawned(1, 11)), (1.0, BecameReady(1)), policy=policy)


def test_table_lists_every_pair_of_state_and_event() -> None:
    assert {state: set(row) for state, row in RULES.items()} == {
        state: set(EVENTS) for state in State
    }


@pytest.mark.parametrize("policy", diagram.POLICIES, ids=lambda policy: policy.restart.policy)
def test_every_reachable_step_keeps_the_invariants(policy: Policy) -> None:
    states = set()
    steps = 0
    for before, event, service in diagram.walk(policy):
        steps += 1
        states.add(service.state)
        told = f"{before.state} {event} -> {service}"
        if service.state in {State.BACKOFF, State.STARTING, State.DRAINING, State.STOPPING}:
            assert service.timer_at is not None, told
        if service.state in {State.READY, State.UNREADY, State.STOPPED}:
            assert service.timer_at is None, told
        if service.state not in ALIVE:
            assert service.pid is None, told
        if service.state in {State.STARTING, State.READY, State.UNREADY, State.BACKOFF}:
            assert service.want is Want.UP, told
        if service.state not in {State.READY, State.STARTING}:
            assert service.why, told
        if not isinstance(event, StartAsked | StopAsked | RestartAsked | Exited | Adopted):
            assert service.want is before.want, told
        if before.state in ALIVE and service.state not in ALIVE:
            assert isinstance(event, Exited | SpawnFailed), told
        if service.generation != before.generation:
            assert service.generation == before.generation + 1, told
            assert not service.missing or isinstance(event, Adopted | Succeeded), told
    assert states == set(State)
    assert steps > 500


@pytest.mark.parametrize("policy", diagram.POLICIES, ids=lambda policy: policy.restart.policy)
def test_actions_fit_the_state_they_lead_to(policy: Policy) -> None:
    allowed = {
        Spawn: {State.STARTING},
        Drain: {State.DRAINING},
        Terminate: {State.STOPPING},
        Kill: {State.STOPPING},
    }
    for before, event, service in diagram.walk(policy):
        now = (before.timer_at or 0.0) + 1.0
        if isinstance(event, TimerElapsed):
            now = event.at
        again, actions = step(before, event, now)
        for action in actions:
            assert again.state in allowed[type(action)], f"{before} {event} {action}"
            assert action.generation == again.generation
        assert len(actions) <= 1
        assert isinstance(service, Service)


def test_a_stale_generation_changes_nothing() -> None:
    service = ready()
    for event in (
        Exited(0, "killed"),
        BecameUnready(0, "no"),
        SpawnFailed(2, "no"),
        Drained(0),
        Progressed(0),
    ):
        assert step(service, event, 5.0) == (service, ())


def test_a_stale_timer_changes_nothing() -> None:
    service = after((0.0, StartAsked()), (3.0, Progressed(1)))
    assert service.timer_at == 13.0
    assert step(service, TimerElapsed(10.0), 10.0) == (service, ())


def test_a_hang_is_a_death_and_killed_without_waiting_for_sigterm() -> None:
    service, actions = step(ready(), Hung(1, "decoded nothing for 30s"), 10.0)
    assert (service.state, actions) == (State.STOPPING, (Kill(1),))
    assert (service.deaths, service.why) == ((10.0,), "decoded nothing for 30s")

    service, actions = step(service, Exited(1, "killed by SIGKILL"), 10.1)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_a_hang_while_draining_ends_the_stop_and_is_no_death() -> None:
    draining, _ = step(ready(), StopAsked(), 5.0)
    service, actions = step(draining, Hung(1, "decoded nothing for 30s"), 10.0)
    assert (service.state, actions, service.deaths) == (State.STOPPING, (Kill(1),), ())
    assert step(service, Exited(1, "killed by SIGKILL"), 10.1)[0].state is State.STOPPED


def test_a_successor_takes_the_place_of_a_ready_process() -> None:
    service, actions = step(ready(), Succeeded(2, 12), 10.0)
    assert (service.state, service.generation, service.pid) == (State.READY, 2, 12)
    assert actions == ()
    assert step(service, Exited(1, "exited with status 0", clean=True), 11.0) == (service, ())


def test_first_death_restarts_at_once_and_the_next_ones_wait_longer() -> None:
    service, actions = step(ready(), Exited(1, "killed by SIGKILL"), 10.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))
    assert service.restarts == 1

    service, actions = step(service, Exited(2, "killed by SIGKILL"), 11.0)
    assert (service.state, actions) == (State.BACKOFF, ())
    assert service.timer_at is not None
    assert 11.5 <= service.timer_at <= 12.0
    assert service.why.startswith("killed by SIGKILL; next try after ")

    service, actions = step(service, TimerElapsed(service.timer_at), 12.0)
    service, _ = step(service, Exited(3, "killed by SIGKILL"), 13.0)
    assert service.timer_at is not None
    assert 14.0 <= service.timer_at <= 15.0


def test_deaths_after_readiness_count_towards_the_crash_loop() -> None:
    service = ready()
    now = 10.0
    for _ in range(4):
        now += 1.0
        service, _ = step(service, Exited(service.generation, "exited with status 1"), now)
        if service.state is State.BACKOFF:
            assert service.timer_at is not None
            now = service.timer_at
            service, _ = step(service, TimerElapsed(now), now)
        if service.state is State.STARTING:
            service, _ = step(service, BecameReady(service.generation), now)
    assert service.state is State.FAILED
    assert service.why == ("exited with status 1; 4 deaths within 1m40s, next try in 1m40s")
    assert service.timer_at == pytest.approx(now + 100.0)


def test_failed_by_a_crash_loop_is_retried_slowly() -> None:
    failed = replace(ready(), state=State.FAILED, timer_at=200.0, pid=None, deaths=(1.0, 2.0))
    service, actions = step(failed, TimerElapsed(200.0), 200.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_deaths_decay_with_time() -> None:
    service, _ = step(ready(), Exited(1, "killed"), 10.0)
    service, _ = step(service, BecameReady(2), 11.0)
    service, actions = step(service, Exited(2, "killed"), 111.0)
    assert actions == (Spawn(3),), "the first death had left the window"


def test_an_exit_while_stopping_is_not_a_death() -> None:
    service, actions = step(ready(), StopAsked(drain=False), 5.0)
    assert actions == (Terminate(1),)
    service, actions = step(service, Exited(1, "killed by SIGTERM"), 6.0)
    assert (service.state, service.deaths, actions) == (State.STOPPED, (), ())


def test_a_stop_drains_terminates_and_kills() -> None:
    service, actions = step(ready(), StopAsked(), 5.0)
    assert (service.state, service.timer_at, actions) == (State.DRAINING, 10.0, (Drain(1),))
    service, actions = step(service, TimerElapsed(10.0), 10.0)
    assert (service.state, service.timer_at, actions) == (State.STOPPING, 12.0, (Terminate(1),))
    service, actions = step(service, TimerElapsed(12.0), 12.0)
    assert (service.state, actions) == (State.STOPPING, (Kill(1),))
    assert service.why == (
        "asked to stop; requests still in flight after 5s were cut off; did not exit within 2s"
    )
    service, actions = step(service, TimerElapsed(14.0), 14.0)
    assert actions == (Kill(1),), "killed again until it is gone"
    service, actions = step(service, Exited(1, "killed by SIGKILL"), 14.5)
    assert (service.state, service.why) == (State.STOPPED, "stopped on request")


def test_now_ends_a_drain() -> None:
    draining, _ = step(ready(), StopAsked(), 5.0)
    assert step(draining, StopAsked(), 6.0)[1] == ()
    service, actions = step(draining, StopAsked(drain=False), 6.0)
    assert (service.state, actions) == (State.STOPPING, (Terminate(1),))


def test_not_ready_in_time_is_a_death_counted_once() -> None:
    service = after((0.0, StartAsked()), (0.0, Spawned(1, 11)))
    service, actions = step(service, TimerElapsed(10.0), 10.0)
    assert (service.state, actions) == (State.STOPPING, (Terminate(1),))
    assert service.deaths == (10.0,)
    assert service.why == "was not ready and showed no progress for 10s"
    service, actions = step(service, Exited(1, "killed by SIGTERM"), 10.1)
    assert (service.state, service.deaths, actions) == (State.STARTING, (10.0,), (Spawn(2),))


def test_the_reason_of_a_stall_is_what_the_probes_of_that_start_found() -> None:
    """Given a start that stalled, the next one's reason does not carry the first one's along."""
    service = after((0.0, StartAsked()), (0.0, Spawned(1, 11)), (1.0, ProbeFailed(1, "refused")))
    assert service.why == "refused"
    service, _ = step(service, TimerElapsed(10.0), 10.0)
    assert service.why == "was not ready and showed no progress for 10s: refused"
    service, _ = step(service, Exited(1, "killed by SIGTERM"), 10.1)
    service, _ = step(service, TimerElapsed(20.1), 20.1)
    assert service.why == "was not ready and showed no progress for 10s"


def test_progress_extends_the_start_up_to_the_cap() -> None:
    service = after((0.0, StartAsked()), (9.0, Progressed(1)), (18.0, Progressed(1)))
    assert service.timer_at == 28.0
    service, _ = step(service, Progressed(1), 27.0)
    assert service.timer_at == 30.0, "the hard cap"
    service, _ = step(service, TimerElapsed(30.0), 30.0)
    assert service.why == "was not ready within 30s"


def test_a_start_waits_for_its_dependencies() -> None:
    service = after((0.0, DependenciesChanged(("qdrant",))), (0.0, StartAsked()))
    assert (service.state, service.want) == (State.STOPPED, Want.UP)
    assert service.why == "waits for qdrant to be ready"
    service, actions = step(service, DependenciesChanged(()), 3.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(1),))


def test_a_lost_dependency_stops_nobody_but_delays_the_next_spawn() -> None:
    service, actions = step(ready(), DependenciesChanged(("qdrant",)), 5.0)
    assert (service.state, actions) == (State.READY, ())
    service, actions = step(service, Exited(1, "killed"), 6.0)
    assert (service.state, service.want, actions) == (State.STOPPED, Want.UP, ())


def test_a_permanent_cause_fails_at_once_without_a_retry() -> None:
    service = after((0.0, StartAsked()), (0.0, SpawnFailed(1, "no such file", permanent=True)))
    assert (service.state, service.timer_at, service.want) == (State.FAILED, None, Want.UP)
    assert service.why == "no such file; not tried again before llmsup start"
    service, actions = step(service, StartAsked(), 9.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_a_shortage_is_waited_out_and_is_no_death() -> None:
    """Given more failed spawns than a crash loop has, the next try is as soon as the first."""
    service, now = after((0.0, StartAsked()), (1.0, Exited(1, "killed"))), 1.0
    assert (service.restarts, service.deaths) == (1, (1.0,))
    for _ in range(POLICY.restart.max_deaths + 2):
        short = SpawnFailed(service.generation, "Too many open files", shortage=True)
        service, actions = step(service, short, now)
        assert (service.state, service.deaths, actions) == (State.BACKOFF, (1.0,), ())
        assert service.why == "Too many open files"
        assert service.timer_at == now + SHORTAGE_RETRY_S
        now += SHORTAGE_RETRY_S
        service, actions = step(service, TimerElapsed(now), now)
        assert (service.state, actions) == (State.STARTING, (Spawn(service.generation),))
    assert service.restarts == 1


def test_no_room_on_the_card_is_told_at_once_tried_again_and_is_no_death() -> None:
    service = after((0.0, StartAsked()))
    refused = SpawnFailed(1, "needs 3000 MiB of 2000", shortage=True, cause=Cause.NO_ROOM)
    service, actions = step(service, refused, 1.0)
    assert (service.state, service.deaths, actions) == (State.FAILED, (), ())
    assert service.why == "needs 3000 MiB of 2000; tried again once there is room"
    assert service.timer_at == 1.0 + NO_ROOM_RETRY_S
    service, actions = step(service, TimerElapsed(service.timer_at), service.timer_at)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_a_spawn_that_has_to_wait_does_not_use_up_the_time_of_the_start() -> None:
    service = after((0.0, StartAsked()), (9.0, Postponed(1, "waits for the card")))
    assert (service.why, service.timer_at) == ("waits for the card", 19.0)
    service, actions = step(service, Postponed(1, "waits for the card"), 100.0)
    service, actions = step(service, Postponed(1, ""), 105.0)
    assert (service.state, service.why, service.started_at, actions) == (
        State.STARTING, "", 105.0, (),
    )  # fmt: skip
    service, _ = step(service, Progressed(1), 134.0)
    assert service.timer_at == 135.0, "the hard cap counts from the end of the wait"


def test_a_spawn_that_nobody_sees_to_any_more_is_given_up_and_made_anew() -> None:
    service = after((0.0, StartAsked()), (1.0, Postponed(1, "waits for the card")))
    service, actions = step(service, TimerElapsed(11.0), 11.0)
    assert (service.state, actions) == (State.STOPPING, (Terminate(1),))
    service, actions = step(service, SpawnFailed(1, "stopped before it was spawned"), 11.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_a_remedied_death_is_counted_but_never_ends_in_a_crash_loop() -> None:
    service, now = after((0.0, StartAsked())), 0.0
    for _ in range(POLICY.restart.max_deaths + 2):
        now += 1.0
        out = Exited(service.generation, "no memory", remedied=True, cause=Cause.GPU_MEMORY)
        service, actions = step(service, out, now)
        assert (service.state, actions) == (State.STARTING, (Spawn(service.generation),))
        assert service.death is not None
        assert service.death.at == now
    assert len(service.deaths) == POLICY.restart.max_deaths
    service, actions = step(service, Exited(service.generation, "killed"), now)
    assert service.state is State.FAILED, "any other death finds them counted"


def test_policy_never_is_obeyed_even_where_there_is_a_remedy() -> None:
    policy = replace(POLICY, restart=Restart(policy="never"))
    service, actions = step(ready(policy), Exited(1, "no memory", remedied=True), 5.0)
    assert (service.state, actions) == (State.FAILED, ())


def test_a_clean_exit_ends_a_job_whose_policy_allows_it() -> None:
    policy = replace(POLICY, restart=Restart(policy="on-failure"))
    service, actions = step(ready(policy), Exited(1, "exited with status 0", clean=True), 5.0)
    assert (service.state, service.want, actions) == (State.STOPPED, Want.DOWN, ())
    assert service.why == "exited with status 0; its restart policy is on-failure"
    service, actions = step(ready(policy), Exited(1, "exited with status 1"), 5.0)
    assert actions == (Spawn(2),)


def test_policy_never_fails_on_a_death_but_obeys_a_restart() -> None:
    policy = replace(POLICY, restart=Restart(policy="never"))
    service, _ = step(ready(policy), Exited(1, "killed by SIGKILL"), 5.0)
    assert (service.state, service.timer_at) == (State.FAILED, None)
    service, _ = step(ready(policy), RestartAsked(drain=False), 5.0)
    service, actions = step(service, Exited(1, "killed by SIGTERM"), 6.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_a_restart_forgives_past_deaths() -> None:
    service, _ = step(ready(), Exited(1, "killed"), 10.0)
    service, _ = step(service, BecameReady(2), 11.0)
    service, _ = step(service, RestartAsked(drain=False), 12.0)
    service, actions = step(service, Exited(2, "killed by SIGTERM"), 13.0)
    assert (service.deaths, actions) == ((), (Spawn(3),))


def test_a_start_during_a_stop_starts_anew_after_it() -> None:
    service, _ = step(ready(), StopAsked(drain=False), 5.0)
    service, actions = step(service, StartAsked(), 5.5)
    assert (service.state, actions) == (State.STOPPING, ())
    service, actions = step(service, Exited(1, "killed by SIGTERM"), 6.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(2),))


def test_an_adopted_process_is_ready_once_a_probe_says_so_and_dies_like_any_other() -> None:
    service = after((5.0, Adopted(7, 4711)))
    assert (service.state, service.want, service.pid) == (State.STARTING, Want.UP, 4711)
    service, actions = step(service, BecameReady(7), 5.1)
    assert (service.state, actions) == (State.READY, ())
    service, actions = step(service, Exited(7, "killed by SIGKILL"), 6.0)
    assert (service.state, actions) == (State.STARTING, (Spawn(8),))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_happens_the_service_can_be_stopped_and_started(data: st.DataObject) -> None:
    """Given any history, a stop and the exit it asks for end in STOPPED; a start then spawns."""
    service, now = Service("chat", POLICY), 0.0
    for _ in range(data.draw(st.integers(0, 25))):
        event = data.draw(st.sampled_from(diagram.variants(service)))
        now += data.draw(st.sampled_from([0.0, 0.1, 3.0, 50.0, 500.0]))
        service, _ = step(service, event, now)
        assert len(service.deaths) <= POLICY.restart.max_deaths
        if service.timer_at is not None and service.state is not State.FAILED:
            assert service.timer_at - now <= 30.0
    service, _ = step(service, DependenciesChanged(()), now)
    service, _ = step(service, StopAsked(drain=False), now)
    if service.state in ALIVE:
        service, _ = step(service, Exited(service.generation, "killed by SIGTERM"), now)
    assert (service.want, service.state) == (Want.DOWN, State.STOPPED)
    service, actions = step(service, StartAsked(), now)
    assert (service.state, len(actions)) == (State.STARTING, 1)
