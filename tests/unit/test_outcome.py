"""When a start is over: snapshots of a stack and what is concluded from them."""

import pytest

from llmsup.cli.outcome import Outcome, is_degraded, outcome, troubles, unready
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


@pytest.mark.parametrize("state", ["ready", "failed", "stopped"])
def test_older_generations_do_not_count(state: str) -> None:
    old = service("chat", state, want="down" if state == "stopped" else "up", generation=1)

    assert outcome(snapshot(old), {"chat": 2}) is Outcome.WAITING
    assert outcome(snapshot(old), {"chat": 1}) is not Outcome.WAITING


def test_a_service_behind_a_failed_one_that_nobody_asked_for_is_given_up() -> None:
    status = snapshot(READY, FAILED, BLOCKED)

    assert outcome(status, {"rag": 2}) is Outcome.FAILED
    assert troubles(status, {"rag": 2}) == ["rag stopped: waits for code to be ready"]


def test_others_are_not_waited_for() -> None:
    assert outcome(snapshot(READY, STARTING), {"chat": 0}) is Outcome.READY


def test_what_is_said_of_the_rest() -> None:
    status = snapshot(READY, FAILED, BLOCKED)
    names = {"chat": 0, "code": 0, "rag": 0}

    assert troubles(status, names) == [
        "code failed: no such model",
        "rag stopped: waits for code to be ready",
    ]
    assert unready(status, names) == ["code (failed)", "rag (stopped)"]


def test_only_what_is_wanted_can_degrade() -> None:
    assert not is_degraded(snapshot(READY, STOPPED))
    assert is_degraded(snapshot(READY, STARTING))
