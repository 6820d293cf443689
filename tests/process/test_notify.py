"""What systemd is told, on a real datagram socket: by the notifier, and by a whole daemon."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmsup.host.notify import Notifier, watchdog_period_s
from tests.home import LLMSUP, Home, free_ports, is_alive, stub, wait_until
from tests.process.test_adoption import pids
from tests.process.test_reload import edit
from tests.process.test_stack import dual


class Manager:
    """Stands in for systemd at the other end of NOTIFY_SOCKET. Keeps what it was told, in order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.told: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        while True:
            try:
                text = self.socket.recv(65536).decode()
            except BlockingIOError:
                return self.told
            self.told.append(dict(line.split("=", 1) for line in text.split("\n")))

    def has(self, key: str, pattern: str = "1") -> bool:
        return any(re.fullmatch(pattern, each.get(key, "\n")) for each in self.listen())

    def keys(self) -> list[str]:
        """The first key of each message, without pings, status lines and extensions."""
        noise = {"WATCHDOG", "STATUS", "EXTEND_TIMEOUT_USEC"}
        return [key for each in self.listen() for key in list(each)[:1] if key not in noise]

    def status(self) -> str:
        return next((each["STATUS"] for each in reversed(self.listen()) if "STATUS" in each), "")


@pytest.fixture
def manager(home: Home) -> Iterator[Manager]:
    manager = Manager(str(home.root / "notify"))
    try:
        yield manager
    finally:
        manager.socket.close()


@contextmanager
def daemon_of(home: Home, manager: Manager, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """`llmsup start --foreground` as the main process of a unit."""
    with subprocess.Popen(
        [LLMSUP, "start", str(home.profile), "--foreground"],
        env={**home.environ, "NOTIFY_SOCKET": manager.address, **environ},
        cwd=home.root, stderr=subprocess.DEVNULL,
    ) as daemon:  # fmt: skip
        try:
            yield daemon
        finally:
            daemon.kill()


# --- the notifier


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_message_arrives(home: Home, is_abstract: bool) -> None:
    manager = Manager(f"@{home.root.name}" if is_abstract else str(home.root / "notify"))
    with manager.socket:
        notifier = Notifier({"NOTIFY_SOCKET": manager.address})
        assert notifier.tell(READY="1", STATUS="two\nlines = one")
        assert manager.listen() == [{"READY": "1", "STATUS": "two lines = one"}]


@pytest.mark.parametrize(
    "address", ["", "relative", "vsock:2:1", "/nowhere/notify", "@nobody", "/" + "x" * 300, "@"]
)
def test_nobody_there_is_no_error(address: str) -> None:
    assert not Notifier({"NOTIFY_SOCKET": address}).tell(READY="1")


def test_a_socket_that_is_full_blocks_nobody_and_works_again(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    sent = 0
    while notifier.tell(STATUS="x" * 1000):
        sent += 1
        assert sent < 100_000
    assert len(manager.listen()) == sent
    assert notifier.tell(READY="1")


def test_a_socket_that_was_replaced_is_found_again(home: Home, manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    assert notifier.tell(READY="1")
    Path(manager.address).unlink()
    assert not notifier.tell(READY="1")
    again = Manager(manager.address)
    with again.socket:
        assert notifier.tell(READY="1")


@pytest.mark.parametrize(
    ("environ", "period_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_only_where_it_is_ours(
    environ: dict[str, str], period_s: float | None
) -> None:
    assert watchdog_period_s(environ) == period_s


# --- the daemon


def test_ready_is_told_once_everything_is(home: Home, manager: Manager) -> None:
    dual(home)
    edit(home, '"--name", "code"', '"--name", "code", "--load-s", "1"')
    with daemon_of(home, manager) as daemon:
        wait_until(lambda: manager.has("READY"), "READY")
        assert {each["state"] for each in home.status()["services"]} == {"ready"}
        assert manager.keys() == ["READY"]
        assert manager.status() == "3 of 3 ready"
        assert manager.has("STATUS", "2 of 3 ready; code starting.*")
        assert manager.has("EXTEND_TIMEOUT_USEC", "[1-9][0-9]+"), "a load may take its time"

        old = home.service("chat")
        os.kill(old["pid"], signal.SIGKILL)
        home.wait_replaced(old)
        wait_until(lambda: manager.status() == "3 of 3 ready", "the status line")
        assert manager.keys() == ["READY"], "a death changes the status line alone"

        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    assert manager.keys() == ["READY", "STOPPING"]
    assert manager.has("STATUS", "stopping: .*chat.*")


def test_ready_is_told_with_a_service_that_failed_and_why(home: Home, manager: Manager) -> None:
    dual(home)
    broken = home.command("broken", ["/nowhere/program"])
    waiting = home.command("waiting", ["sleep", "1000"], depends_on=["broken"])
    home.write(home.profile.read_text() + broken + waiting)
    with daemon_of(home, manager):
        wait_until(lambda: manager.has("READY"), "READY")
        line = "3 of 5 ready; broken failed: cannot start /nowhere/program: .*…; waiting waiting.*"
        assert re.fullmatch(line, manager.status())


def test_a_reload_is_told_from_its_beginning_to_its_end(home: Home, manager: Manager) -> None:
    dual(home)
    with daemon_of(home, manager) as daemon:
        wait_until(lambda: manager.has("READY"), "READY")
        asked_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        edit(home, "[service.code]\n", '[service.code]\nenv = { SPEED = "1" }\n')
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.keys().count("READY") == 2, "READY again")
        assert home.service("code")["generation"] == 2
        assert home.service("code")["state"] == "ready", "the restart belongs to the reload"
        keys = manager.keys()
        assert (keys[0], keys[-1], set(keys[1:-1])) == ("READY", "READY", {"RELOADING"})
        began = [int(each["MONOTONIC_USEC"]) for each in manager.told if "RELOADING" in each]
        assert min(began) >= asked_us


def test_a_refused_reload_is_over_at_once_and_the_status_says_so(
    home: Home, manager: Manager
) -> None:
    dual(home)
    with daemon_of(home, manager) as daemon:
        wait_until(lambda: manager.has("READY"), "READY")
        good = home.profile.read_text()
        home.profile.write_text("nonsense")
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.keys() == ["READY", "RELOADING", "READY"], "READY again")
        assert re.fullmatch("3 of 3 ready; reload refused: .*test.toml: .*", manager.status())
        home.profile.write_text(good)
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.status() == "3 of 3 ready", "the status line")


def test_the_watchdog_is_fed_also_after_a_reload(home: Home, manager: Manager) -> None:
    """Given a watchdog of two seconds, no ping is later than that."""
    dual(home)
    period_s = 2.0
    with daemon_of(home, manager, WATCHDOG_USEC=str(int(period_s * 1e6))) as daemon:
        wait_until(lambda: manager.has("WATCHDOG"), "a ping")
        wait_until(lambda: manager.has("READY"), "READY")
        pings = sum("WATCHDOG" in each for each in manager.listen())
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: manager.keys().count("READY") == 2, "READY again")
        wait_until(
            lambda: sum("WATCHDOG" in each for each in manager.listen()) >= pings + 3, "more pings"
        )


def test_a_daemon_that_is_stuck_feeds_no_watchdog(home: Home, manager: Manager) -> None:
    dual(home)
    with daemon_of(home, manager, WATCHDOG_USEC="200000") as daemon:
        wait_until(lambda: manager.has("READY"), "READY")
        daemon.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        manager.listen()
        manager.told.clear()
        time.sleep(1.0)
        assert manager.listen() == []
        # What systemd does then; the traceback is for the journal.
        daemon.send_signal(signal.SIGABRT)
        daemon.send_signal(signal.SIGCONT)
        assert daemon.wait(30) == -signal.SIGABRT
    assert len(home.processes()) >= 3, "the servers live on"


def test_what_is_started_cannot_speak_to_the_service_manager(home: Home, manager: Manager) -> None:
    dual(home)
    with daemon_of(home, manager, WATCHDOG_USEC="2000000"):
        wait_until(lambda: manager.has("READY"), "READY")
        for pid in pids(home).values():
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"NOTIFY_SOCKET" not in environ
            assert b"WATCHDOG_" not in environ


def test_a_daemon_in_the_background_speaks_for_no_unit(home: Home, manager: Manager) -> None:
    dual(home)
    home.environ |= {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    home.start()
    assert manager.listen() == []


def test_a_service_manager_that_is_gone_changes_nothing(home: Home, manager: Manager) -> None:
    dual(home)
    with daemon_of(home, manager) as daemon:
        wait_until(lambda: manager.has("READY"), "READY")
        Path(manager.address).unlink()
        old = home.service("chat")
        os.kill(old["pid"], signal.SIGKILL)
        home.wait_replaced(old)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0


def test_the_next_daemon_after_a_crash_is_ready_with_what_it_adopts(
    home: Home, manager: Manager
) -> None:
    dual(home)
    with daemon_of(home, manager) as daemon:
        wait_until(lambda: manager.has("READY"), "READY")
        before = pids(home)
        daemon.kill()
        wait_until(lambda: not is_alive(daemon.pid), "its end")
    with daemon_of(home, manager):
        wait_until(lambda: manager.keys() == ["READY", "READY"], "READY again")
        assert pids(home) == before


def test_a_crash_loop_does_not_keep_the_start_job(home: Home, manager: Manager) -> None:
    (port,) = free_ports(1)
    home.write(home.command("brief", stub("children.py", "exit-at-once"), port=port))
    with daemon_of(home, manager):
        wait_until(lambda: manager.has("READY"), "READY")
        assert "brief" in manager.status()
