"""Troubles: each is said when it begins and when it ends, and stands in between."""

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsup.host import appending
from llmsup.host.appending import Appender
from llmsup.host.daemon_log import LogToStderr
from llmsup.host.journal import Journal
from llmsup.troubles import Troubles

FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """A file with room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.content = b""

    def write(self, text: bytes) -> int:
        if not self.room:
            raise FULL
        written = text[: self.room]
        self.content += written
        self.room -= len(written)
        return len(written)


def appender(disk: Disk, troubles: Troubles) -> Appender:
    return Appender(disk.write, troubles, "lines are not written", lambda n: b"lost %d\n" % n)


def test_a_trouble_is_logged_when_it_begins_and_when_it_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    troubles = Troubles()
    for reason in ("full", "full", "read-only", "", "", "full"):
        troubles.tell("events are lost", reason)
    assert troubles.sentences == ["events are lost: full"]
    assert caplog.messages == [
        "events are lost: full", "no longer: events are lost", "events are lost: full",
    ]  # fmt: skip


def test_the_present_reason_is_told_in_the_order_of_the_beginnings() -> None:
    troubles = Troubles()
    for what, reason in (("a", "1"), ("b", "2"), ("a", "3")):
        troubles.tell(what, reason)
    assert troubles.sentences == ["a: 3", "b: 2"]


def test_only_what_fails_is_tried_again() -> None:
    troubles = Troubles()
    tried: list[str] = []

    def retry(what: str) -> Callable[[], None]:
        def again() -> None:
            tried.append(what)
            troubles.tell(what, "" if what == "a" else "still", again)

        return again

    troubles.tell("a", "full", retry("a"))
    troubles.tell("b", "full", retry("b"))
    troubles.tell("c", "full")
    troubles.retry()
    troubles.retry()
    assert tried == ["a", "b", "b"]
    assert troubles.sentences == ["b: still", "c: full"]


def test_what_is_no_oserror_is_not_swallowed() -> None:
    troubles = Troubles()
    with pytest.raises(ValueError, match="a bug"), troubles.watched("work"):
        raise ValueError("a bug")
    assert troubles.sentences == []


def test_lines_wait_for_room_and_none_is_cut_or_doubled() -> None:
    """Given room in the middle of a line, it is completed before the next one."""
    disk, troubles = Disk(room=8), Troubles()
    lines = appender(disk, troubles)
    for number in range(4):
        lines.append(b"line %d\n" % number)
    assert disk.content == b"line 0\nl"
    assert troubles.sentences == ["lines are not written: No space left on device"]
    disk.room = 9
    troubles.retry()
    assert disk.content == b"line 0\nline 1\nlin"
    disk.room = 1000
    troubles.retry()
    assert disk.content == b"line 0\nline 1\nline 2\nline 3\n"
    assert troubles.sentences == []


def test_lines_beyond_the_limit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "WAITING_MAX", 2)
    disk, troubles = Disk(room=0), Troubles()
    lines = appender(disk, troubles)
    for number in range(5):
        lines.append(b"line %d\n" % number)
    disk.room = 1000
    lines.append(b"line 5\n")
    assert disk.content == b"line 0\nline 1\nlost 4\n"
    lines.append(b"line 6\n")
    assert disk.content == b"line 0\nline 1\nlost 4\nline 6\n"


def test_the_journal_says_how_many_events_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "WAITING_MAX", 1)
    troubles = Troubles()
    journal = Journal(tmp_path / "missing" / "events.jsonl", troubles)
    journal.write("state", service="chat")
    journal.write("state", service="code")
    assert len(troubles.sentences) == 1
    (tmp_path / "missing").mkdir()
    troubles.retry()
    written = (tmp_path / "missing" / "events.jsonl").read_text()
    events = [json.loads(line) for line in written.splitlines()]
    assert [event["event"] for event in events] == ["state", "daemon"]
    assert events[1]["why"] == "1 events before this one could not be written"


def test_a_log_that_cannot_be_written_raises_nothing_and_says_all_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own trouble goes to the log that does not work, without going round in circles."""
    disk, troubles = Disk(room=0), Troubles()
    monkeypatch.setattr("llmsup.host.daemon_log.os.write", lambda _file, line: disk.write(line))
    logger = logging.getLogger("llmsup")
    handler = LogToStderr(troubles)
    logger.addHandler(handler)
    try:
        logger.warning("first")
        logger.warning("second")
        assert troubles.sentences == [
            "the daemon's log is not being written: No space left on device"
        ]
        disk.room = 10_000
        troubles.retry()
    finally:
        logger.removeHandler(handler)
    assert troubles.sentences == []
    assert [line.split(" ", 3)[3] for line in disk.content.decode().splitlines()[:2]] == [
        "first",
        "the daemon's log is not being written: No space left on device",
    ]
    assert b"second" in disk.content
    assert "Traceback" not in capsys.readouterr().err
