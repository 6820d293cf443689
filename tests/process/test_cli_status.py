"""The command line as a process: exit codes, what goes to stdout, and how it ends."""

import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmsup.control.wire import ServiceInfo
from tests.fake_daemon import FakeStack, held, service, serving
from tests.home import LLMSUP, Home, wait_until

NOT_RUNNING = "error: llmsup is not running\nhint: llmsup start\n"


@pytest.mark.parametrize(
    ("services", "code"),
    [
        ([service("chat"), service("code", "stopped", want="down")], 0),
        ([service("chat"), service("code", "starting")], 1),
        ([service("chat", "failed", why="no such model")], 1),
        ([service("chat"), service("gateway", "stopped", want="down")], 1),
    ],
)
def test_the_exit_status_says_how_the_stack_is(
    home: Home, services: list[ServiceInfo], code: int
) -> None:
    with serving(home.paths, FakeStack(*services)):
        table = home.cli("status")
        data = home.cli("status", "--json")

    assert (table.returncode, data.returncode) == (code, code)
    assert table.stdout.startswith("demo · daemon pid 123 · up 3m00s · http://127.0.0.1:8000/v1\n")
    assert json.loads(data.stdout)["services"] == services
    assert table.stderr == data.stderr == ""


def test_not_running(home: Home) -> None:
    table = home.cli("status")
    data = home.cli("status", "--json")

    assert (table.returncode, table.stdout, table.stderr) == (3, "", NOT_RUNNING)
    assert (data.returncode, data.stderr) == (3, NOT_RUNNING)
    assert json.loads(data.stdout) == {
        "daemon": None, "gpu": None, "gpu_why": "", "gateway": None, "services": [], "routes": [],
    }  # fmt: skip


def test_unknown(home: Home) -> None:
    home.paths.create()
    with held(home.paths.lock):
        result = home.cli("status")

    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr.startswith("error: the daemon (pid 123) is starting or stopping")
    assert result.stderr.count("\n") == 2


def test_the_quick_way_around_typer_prints_the_same(home: Home) -> None:
    """Given `status` in the forms that skip Typer, the forms that do not say the same."""
    with serving(home.paths, FakeStack(service("chat"))):
        quick = home.cli("status", "--json")
        full = home.cli("status", "--json", "--json")

    assert (full.returncode, full.stdout) == (quick.returncode, quick.stdout)


@pytest.mark.parametrize("verb", ["upstreams", "restart"])
def test_verbs_that_need_a_daemon(home: Home, verb: str) -> None:
    result = home.cli(verb)

    assert (result.returncode, result.stderr) == (3, NOT_RUNNING)


def test_stop_is_idempotent(home: Home) -> None:
    result = home.cli("stop")

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "not up\n")
    assert list(home.root.iterdir()) == []


def test_an_unknown_service_names_the_known_ones(home: Home) -> None:
    with serving(home.paths, FakeStack(service("chat"))):
        result = home.cli("stop", "chta")

    assert (result.returncode, result.stderr) == (
        2, "error: unknown service: chta\nhint: known services: chat\n",
    )  # fmt: skip


# --- files


def test_logs_work_without_a_daemon(home: Home) -> None:
    home.paths.create()
    home.paths.service_log("chat").write_text("one\ntwo\nthree\n")
    home.paths.daemon_log.write_text("up\n")

    assert home.cli("logs", "chat", "-n", "2").stdout == "two\nthree\n"
    assert home.cli("logs", "daemon").stdout == "up\n"
    for name in ("chta", "../daemon", "*"):
        result = home.cli("logs", name)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.endswith("hint: there are logs of: chat, daemon\n")


def test_events_skip_what_is_cut_off(home: Home) -> None:
    home.paths.create()
    lines = [
        {"time": 1.5, "at_s": 1, "event": "state", "service": "chat", "state": "ready", "why": ""},
        {"time": 2.5, "at_s": 2, "event": "published", "route": "r", "upstreams": ["chat"]},
    ]
    texts = [json.dumps(line) for line in lines]
    home.paths.events.write_text(texts[0] + "\n" + texts[1][:20] + "\n[]\n" + texts[1] + "\n")

    shown = home.cli("events").stdout.splitlines()
    data = home.cli("events", "--json", "-n", "1").stdout

    assert shown[0].startswith("19")
    assert [line[14:] for line in shown[1:]] == ["chat  ready", "r     upstreams: chat"]
    assert json.loads(data) == lines[1]


@pytest.mark.parametrize("arguments", [["events"], ["events", "--json"], ["logs", "chat"]])
def test_nothing_yet_is_no_error(home: Home, arguments: list[str]) -> None:
    home.paths.create()
    home.paths.service_log("chat").touch()

    result = home.cli(*arguments)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "nothing yet\n")


def test_followed_events_come_as_they_are_written(home: Home) -> None:
    home.paths.create()
    event = {"time": 1.5, "at_s": 1, "event": "daemon", "why": "stopping"}
    home.paths.events.touch()
    said = home.root / "said"
    with running(home, "events", "-f", stdout=said) as process:
        with home.paths.events.open("a") as journal:
            journal.write(json.dumps(event) + "\n")
        wait_until(lambda: "daemon  stopping" in said.read_text(), "the event")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


# --- terminals


def test_colours_are_for_terminals_that_want_them(home: Home) -> None:
    stack = FakeStack(service("chat"))
    with serving(home.paths, stack):
        piped = home.cli("status").stdout
        plain = on_terminal(home, {"NO_COLOR": "1"}, "status")
        coloured = on_terminal(home, {"NO_COLOR": ""}, "status")

    assert "\x1b" not in piped + plain
    assert "\x1b[32mready\x1b[0m" in coloured


def test_watching_survives_the_daemon(home: Home) -> None:
    stack = FakeStack(service("chat"))
    with terminal(home, {}, "status", "--watch") as (process, screen):
        wait_until(lambda: "llmsup is not running" in screen(), "the first picture")
        with serving(home.paths, stack):
            wait_until(lambda: "daemon pid 123" in screen(), "the stack")
        seen = len(screen())
        wait_until(lambda: "not running" in screen()[seen:], "the end of the daemon")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


# --- tools

Terminal = tuple["subprocess.Popen[bytes]", Callable[[], str]]


@contextlib.contextmanager
def running(
    home: Home, *arguments: str, stdout: Path | None = None, stderr: Path | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """`llmsup …` in the background, its output in files."""
    with (
        (stdout or Path(os.devnull)).open("wb") as out,
        (stderr or Path(os.devnull)).open("wb") as err,
        subprocess.Popen(
            [LLMSUP, *arguments], env=home.environ, cwd=home.root, stdout=out, stderr=err
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def terminal(home: Home, environ: dict[str, str], *arguments: str) -> "Iterator[Terminal]":
    """`llmsup …` on a terminal of its own; what it draws can be looked at."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    drawn = bytearray()

    def screen() -> str:
        with contextlib.suppress(BlockingIOError, OSError):
            while chunk := os.read(ours, 65536):
                drawn.extend(chunk)
        return drawn.decode(errors="replace")

    with subprocess.Popen(
        [LLMSUP, *arguments],
        env={**home.environ, "TERM": "xterm", **environ},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        try:
            yield process, screen
        finally:
            process.kill()
            os.close(ours)


def on_terminal(home: Home, environ: dict[str, str], *arguments: str) -> str:
    """All that `llmsup …` draws on a terminal."""
    with terminal(home, environ, *arguments) as (process, screen):
        wait_until(lambda: process.poll() is not None, "the end")
        return screen()
