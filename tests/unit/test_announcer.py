"""The status line, and when a start is over, told from snapshots."""

import pytest

from llmsup.announcer import has_settled, status_line
from llmsup.control.wire import ServiceInfo
from tests.fake_daemon import service, snapshot

CHAT = service("chat")
FAILED = service("code", "failed", why="model file corrupt")
WAITING = service("rag", "stopped", pid=None)
UNWANTED = service("spare", "stopped", want="down", pid=None)


@pytest.mark.parametrize(
    ("services", "line", "is_over"),
    [
        ([CHAT, UNWANTED], "1 of 1 ready", True),
        ([CHAT, FAILED], "1 of 2 ready; code failed: model file corrupt", True),
        ([CHAT, service("code", "starting")], "1 of 2 ready; code starting", False),
        ([CHAT, service("code", "backoff")], "1 of 2 ready; code backoff", True),
        ([CHAT, service("code", "unready")], "1 of 2 ready; code unready", True),
        ([CHAT, service("code", "draining")], "1 of 2 ready; code draining", False),
        ([CHAT, WAITING], "1 of 2 ready; rag waiting", False),
        ([FAILED, WAITING], "0 of 2 ready; code failed: model file corrupt; rag waiting", True),
        ([], "0 of 0 ready", True),
    ],
)
def test_each_snapshot_in_one_line(services: list[ServiceInfo], line: str, is_over: bool) -> None:
    assert status_line(snapshot(*services)) == line
    assert has_settled(snapshot(*services)) is is_over


def test_a_restart_that_goes_on_is_not_over() -> None:
    status = snapshot(CHAT)
    status["daemon"]["restarting"] = ["chat"]
    assert not has_settled(status)


def test_a_stop_names_what_is_left() -> None:
    status = snapshot(CHAT, UNWANTED)
    status["daemon"]["stopping"] = True
    assert status_line(status) == "stopping: chat"
