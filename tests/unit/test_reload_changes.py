"""What a reload did, told from the snapshots before and after it."""

from llmsup.cli.reload import changes
from tests.fake_daemon import service, snapshot


def test_each_service_is_told_once_and_truly() -> None:
    before = snapshot(
        service("gateway"),
        service("kept"),
        service("changed"),
        service("gone"),
        service("stopped", "stopped", pid=None, want="down"),
    )
    after = snapshot(
        service("gateway"),
        service("kept"),
        service("changed", generation=2, pid=5),
        service("new", pid=6),
        service("stopped", "stopped", pid=None, want="down"),
    )
    before["routes"] = [{"route": "r", "aliases": [], "services": ["kept"], "published": []}]

    words = str(changes(before, after))

    assert words == (
        "2 services unchanged; restarted changed; started new; ended gone; routes changed: r"
    )


def test_a_gateway_that_was_restarted_is_named() -> None:
    words = str(changes(snapshot(service("gateway")), snapshot(service("gateway", generation=2))))

    assert words == "0 services unchanged; restarted gateway"
