"""When a start is over: snapshots of a stack and what is concluded from them."""

import pytest

from llmsup.cli.outcome import (
    Outcome,
    count_up,
    count_wanted,
    is_degraded,
    outcome,
    troubles,
    unready,
    unrestarted,
)
from llmsup.control.wire import ServiceInfo
from tests.fake_daemon import service, snapshot

READY = service("chat")
STARTING = service("code", "starting")
FAILED = service("code", "failed", why="no such model")
BLOCKED = service("rag", "stopped", why="waits for code to be ready")
STOPPED = service("code", "stopped", want="down")


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        ([READY], Outcome.READY),
        ([], Outcome.READY),
        ([READY, STARTING], Outcome.WAITING),
        ([READY, service("code", "backoff")], Outcome.WAITING),
        ([READY, service("code", "unready")], Outcome.WAITING),
        ([READY, FAILED], Outcome.FAILED),
        ([service("chat", "starting"), FAILED], Outcome.WAITING),
        ([READY, FAILED, BLOCKED], Outcome.FAILED),
        ([READY, STARTING, BLOCKED], Outcome.WAITING),
        ([READY, BLOCKED], Outcome.WAITING),
        ([READY, STOPPED], Outcome.READY),
    ],
)
def test_a_start_ends_when_nothing_moves(services: list[ServiceInfo], expected: Outcome) -> None:
    names = {info["service"]: 0 for info in services}

    assert outcome(snapshot(*services), names) is expected


@pytest.mark.parametrize("state", ["ready", "failed"])
def test_older_generations_do_not_count(state: str) -> None:
    old = service("chat", state, generation=1)

    assert outcome(snapshot(old), {"chat": 2}) is Outcome.WAITING
    assert outcome(snapshot(old), {"chat": 1}) is not Outcome.WAITING


def test_what_somebody_stopped_is_not_waited_for_unless_a_restart_has_yet_to_come_to_it() -> None:
    status = snapshot(service("chat", "stopped", want="down", generation=1))
    assert outcome(status, {"chat": 2}) is Outcome.READY

    status["daemon"]["restarting"] = ["chat"]
    assert outcome(status, {"chat": 2}) is Outcome.WAITING


def test_a_service_behind_a_failed_one_that_nobody_asked_for_is_given_up() -> None:
    status = snapshot(READY, FAILED, BLOCKED)

    assert outcome(status, {"rag": 2}) is Outcome.FAILED
    assert troubles(status, {"rag": 2}) == [BLOCKED]


def test_others_are_not_waited_for() -> None:
    assert outcome(snapshot(READY, STARTING), {"chat": 0}) is Outcome.READY


def test_what_is_said_of_the_rest() -> None:
    status = snapshot(READY, FAILED, BLOCKED)
    names = {"chat": 0, "code": 0, "rag": 0}

    assert troubles(status, names) == [FAILED, BLOCKED]
    assert unready(status, names) == [
        "code (failed: no such model)",
        "rag (stopped: waits for code to be ready)",
    ]
    assert unready(snapshot(STARTING), {"code": 0}) == ["code (starting)"]


def test_only_what_is_wanted_can_degrade() -> None:
    assert not is_degraded(snapshot(READY, STOPPED))
    assert is_degraded(snapshot(READY, STARTING))


def test_a_stack_without_its_gateway_is_degraded_whoever_stopped_it() -> None:
    assert is_degraded(snapshot(READY, service("gateway", "stopped", want="down")))
    assert not is_degraded(snapshot(READY, service("gateway")))


def test_a_stack_that_stops_is_degraded() -> None:
    status = snapshot(READY)
    status["daemon"]["stopping"] = True

    assert is_degraded(status)


def test_the_gateway_is_not_counted() -> None:
    down = service("code", "failed", pid=None)
    status = snapshot(service("gateway"), READY, down, STOPPED)

    assert (count_wanted(status), count_up(status)) == (2, 2)


# --- a rolling restart


OLD = service("code")
DEAD = service("chat", "backoff", generation=2, why="exited with status 1")
NEXT = {"chat": 2, "code": 2}


def test_a_roll_that_goes_on_is_waited_for() -> None:
    status = snapshot(DEAD, OLD)
    status["daemon"]["restarting"] = ["chat", "code"]

    assert (unrestarted(status, NEXT), outcome(status, NEXT)) == ("", Outcome.WAITING)


def test_a_roll_that_ended_names_what_it_did_not_come_to_and_why() -> None:
    words = "chat did not become ready (exited with status 1)"

    assert unrestarted(snapshot(DEAD, OLD), NEXT) == f"code was not restarted: {words}"
    assert unrestarted(snapshot(DEAD, OLD, service("rag")), {**NEXT, "rag": 2}) == (
        f"code, rag were not restarted: {words}"
    )


def test_a_roll_that_ended_at_one_that_is_well_again() -> None:
    again = service("chat", generation=3)

    assert unrestarted(snapshot(again, OLD), NEXT) == "code was not restarted"


def test_a_roll_that_ended_at_one_that_cannot_start() -> None:
    assert unrestarted(snapshot(BLOCKED), {"rag": 2}) == (
        "rag did not become ready (waits for code to be ready)"
    )


def test_what_was_restarted_or_stopped_meanwhile_is_no_trouble() -> None:
    new = service("chat", "starting", generation=2)

    assert unrestarted(snapshot(new, STOPPED), NEXT) == ""
