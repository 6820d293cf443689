"""`llmsup stop` and `llmsup restart` as processes."""

import signal
import socket
import subprocess
import sys

import pytest

from llmsup.cli import wait
from llmsup.cli.stop import stop_stack
from llmsup.errors import UnknownStateError
from tests.fake_daemon import FakeStack, held, service, serving, snapshot
from tests.home import Home, wait_until
from tests.process.test_cli_status import running

HOLDER = """
import fcntl, os, signal, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(f"{os.getpid()}\\n")
lock.flush()
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
print("held", flush=True)
signal.pause()
"""


def test_stop_waits_until_the_daemon_is_gone(home: Home) -> None:
    stack = FakeStack(
        service("gateway"), service("chat"), service("code"), service("rag", "failed", pid=None)
    )
    with serving(home.paths, stack):
        result = home.cli("stop", "--now")

    assert (result.returncode, stack.asked) == (0, [("shut_down", (), True)])
    assert result.stderr.endswith("stopped: demo (2 services)\n")


def test_ctrl_c_during_a_stop_says_that_it_goes_on(home: Home) -> None:
    stack = FakeStack(service("chat", "draining"))
    stack.ends_when_asked = False
    said = home.root / "said"
    with serving(home.paths, stack), running(home, "stop", stderr=said) as process:
        wait_until(lambda: "draining" in said.read_text(), "progress")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130

    assert said.read_text().endswith("it goes on stopping: llmsup status shows it\n")


# --- services


def test_services_that_stop_one_after_another_are_waited_for(home: Home) -> None:
    """Given a service that stays wanted until its dependent is gone."""
    stack = FakeStack(
        service("chat"),
        service("rag"),
        later=[
            snapshot(service("chat"), service("rag", "draining", want="down")),
            snapshot(
                service("chat", "draining", want="down"), service("rag", "stopped", want="down")
            ),
            snapshot(
                service("chat", "stopped", want="down"), service("rag", "stopped", want="down")
            ),
        ],
    )
    with serving(home.paths, stack):
        result = home.cli("stop", "chat", "rag", "chat")

    assert (result.returncode, stack.asked) == (0, [("stop", ("chat", "rag"), False)])
    assert result.stderr.endswith("stopped: chat, rag\n")


@pytest.mark.parametrize(
    "later",
    [
        [
            snapshot(service("chat", "draining", want="down")),
            snapshot(service("chat", "draining")),
        ],
        [snapshot(service("chat", "ready", generation=2))],
    ],
    ids=["while it drains", "between two looks"],
)
def test_a_stop_that_somebody_undoes_ends(home: Home, later: list[object]) -> None:
    stack = FakeStack(service("chat"))
    stack.later = later  # type: ignore[assignment]
    with serving(home.paths, stack):
        result = home.cli("stop", "chat")

    assert result.returncode == 1
    assert "error: chat was started again meanwhile\n" in result.stderr


def test_a_service_that_ends_with_its_daemon_is_stopped(home: Home) -> None:
    stack = FakeStack(service("chat"), later=[snapshot(service("chat", "draining", want="down"))])
    said = home.root / "said"
    with serving(home.paths, stack), running(home, "stop", "chat", stderr=said) as process:
        wait_until(lambda: "draining" in said.read_text(), "progress")
        stack.shut.set()
        assert process.wait(10) == 0

    assert said.read_text().endswith("stopped: chat\n")


# --- restart


def test_a_restart_of_nothing_says_so(home: Home) -> None:
    with serving(home.paths, FakeStack(service("chat", "stopped", want="down"))):
        result = home.cli("restart")

    assert (result.returncode, result.stderr) == (1, "error: nothing is up\nhint: llmsup start\n")


def test_a_restart_that_ends_early_says_where_and_why(home: Home) -> None:
    rolling = snapshot(service("chat", "starting", generation=2), service("code"))
    rolling["daemon"]["restarting"] = ["chat", "code"]
    dead = service("chat", "backoff", generation=2, why="exited with status 1")
    stack = FakeStack(service("chat"), service("code"), later=[rolling, snapshot(dead, OLD_CODE)])
    with serving(home.paths, stack):
        result = home.cli("restart", "chat", "code", "chat")

    assert (result.returncode, stack.asked) == (1, [("restart", ("chat", "code"), False)])
    words = "code was not restarted: chat did not become ready (exited with status 1)"
    assert f"error: {words}\n" in result.stderr


OLD_CODE = service("code")


# --- no daemon, or one that cannot be reached


def test_stop_in_a_home_that_cannot_be_written_is_not_up(home: Home) -> None:
    home.environ["LLMSUP_HOME"] = "/proc/llmsup"

    result = home.cli("stop")

    assert (result.returncode, result.stderr) == (0, "not up\n")


def test_stop_removes_the_files_of_a_killed_daemon(home: Home) -> None:
    home.paths.create()
    (home.paths.gateway / "xds").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(home.paths.control_socket))

    result = home.cli("stop")

    assert (result.returncode, result.stderr) == (0, "not up\n")
    assert list(home.paths.runtime.iterdir()) == []


@pytest.mark.parametrize("now", [False, True])
def test_a_daemon_that_lost_its_socket_is_ended_by_a_signal(
    home: Home, now: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.paths.create()
    monkeypatch.setenv("LLMSUP_HOME", str(home.root))
    monkeypatch.setattr(wait, "SOCKET_TIMEOUT_S", 0.1)
    command = [sys.executable, "-c", HOLDER, str(home.paths.lock), "-m", "llmsup.daemon"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == "held\n"
            stop_stack(now=now)
            assert daemon.wait(10) == 0
        finally:
            daemon.kill()

    said = capsys.readouterr().err
    assert f"the daemon (pid {daemon.pid}) has no control socket" in said
    assert said.endswith("stopped\n")


@pytest.mark.parametrize("pid", ["123", ""])
def test_what_only_holds_the_lock_is_left_alone(
    home: Home, pid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a lock of a process that is no daemon, or whose pid is not written yet."""
    home.paths.create()
    monkeypatch.setenv("LLMSUP_HOME", str(home.root))
    monkeypatch.setattr(wait, "SOCKET_TIMEOUT_S", 0.1)
    with held(home.paths.lock):
        home.paths.lock.write_text(pid)
        with pytest.raises(UnknownStateError, match="has had no control socket") as caught:
            stop_stack(now=False)

    assert f"(pid {pid or 'unknown'})" in caught.value.message
