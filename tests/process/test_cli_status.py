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
from llmsup.host import ports
from tests.fake_daemon import FakeStack, held, service, serving
from tests.home import LLMSUP, Home, free_ports, stub, wait_until

NOT_RUNNING = "error: llmsup is not running\nhint: llmsup start\n"


@pytest.mark.parametrize(
    ("services", "code"),
    [
        ([service("chat"), service("code", "stopped", want="down")], 0),
        ([service("chat"), service("code", "starting")], 1),
        ([service("chat", "failed", why="no such model")], 1),
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
        "daemon": None, "gpu": None, "gateway": None, "services": [], "routes": [],
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


def test_stop_waits_until_the_daemon_is_gone(home: Home) -> None:
    stack = FakeStack(service("chat"), service("code"))
    with serving(home.paths, stack):
        result = home.cli("stop", "--now")

    assert (result.returncode, stack.asked) == (0, [("shut_down", (), True)])
    assert result.stderr.endswith("stopped: demo (2 services)\n")


def test_an_unknown_service_names_the_known_ones(home: Home) -> None:
    with serving(home.paths, FakeStack(service("chat"))):
        result = home.cli("stop", "chta")

    assert (result.returncode, result.stderr) == (
        2, "error: unknown service: chta\nhint: known services: chat\n",
    )  # fmt: skip


def test_start_gives_up_in_time_and_leaves_the_stack_up(home: Home) -> None:
    stack = FakeStack(service("chat", "starting"))
    with serving(home.paths, stack):
        result = home.cli("start", "--timeout", "100ms")

    assert result.returncode == 1
    assert "error: not ready within 100ms: chat (starting)\nhint: the stack stays" in result.stderr
    assert stack.asked == [("start", (), False)]


def test_start_ends_with_the_reason_of_a_failed_service(home: Home) -> None:
    stack = FakeStack(service("chat"), service("code", "failed", why="no such model"))
    with serving(home.paths, stack):
        result = home.cli("start")

    assert result.returncode == 1
    assert "error: code failed: no such model\n" in result.stderr
    assert "hint: the rest stays up; llmsup logs code\n" in result.stderr


def test_interrupting_a_start_leaves_the_stack_up_and_says_so(home: Home) -> None:
    stack = FakeStack(service("chat", "starting"))
    with (
        serving(home.paths, stack),
        running(home, "start", stderr=home.root / "said") as process,
    ):
        wait_until(lambda: "starting" in (home.root / "said").read_text(), "progress")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130

    assert "the stack stays up" in (home.root / "said").read_text()
    assert "Traceback" not in (home.root / "said").read_text()
    assert stack.asked == [("start", (), False)]


@pytest.mark.parametrize("arguments", [["--set", "a=b"], ["other.toml"]])
def test_start_refuses_to_change_a_stack_that_is_up(home: Home, arguments: list[str]) -> None:
    (home.root / "other.toml").write_text(home.command("chat", ["sleep", "60"]))
    stack = FakeStack(service("chat"))
    with serving(home.paths, stack):
        result = home.cli("start", *arguments)

    assert (result.returncode, stack.asked) == (1, [])
    assert result.stderr.startswith("error: demo is up")
    assert "hint: llmsup stop" in result.stderr


def test_start_names_who_holds_a_port(home: Home) -> None:
    (port,) = free_ports(1)
    home.write(home.command("chat", stub("upstream.py", "--port", port), port=port))
    with subprocess.Popen(stub("upstream.py", "--port", port, "--name", "x")) as stranger:
        try:
            wait_until(lambda: bool(ports.owners(port)), "the stranger's port")
            result = home.cli("start", str(home.profile))
        finally:
            stranger.kill()

    assert result.returncode == 2
    assert f"service.chat.port: port {port} is taken by pid {stranger.pid}" in result.stderr
    assert home.daemon_pid() is None


def test_a_daemon_that_ends_at_once_is_an_error_in_its_words(home: Home) -> None:
    """Given a lock file that is a link, which the daemon refuses."""
    home.write(home.command("chat", ["sleep", "60"]))
    home.paths.create()
    home.paths.lock.symlink_to(home.root / "elsewhere")

    result = home.cli("start", str(home.profile))

    assert result.returncode == 1
    assert result.stderr.startswith("error: the daemon ended at once: ")
    assert "Traceback" not in result.stderr


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

    assert [line[14:] for line in shown] == ["chat  ready", "r  upstreams: chat"]
    assert json.loads(data) == lines[1]


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


# --- manners


@pytest.mark.parametrize("verb", [["status", "--json"], ["events"]])
def test_a_reader_that_goes_away_is_no_error(home: Home, verb: list[str]) -> None:
    services = [service(f"chat{number}", why="x" * 1000) for number in range(200)]
    home.paths.create()
    line = '{"time": 1, "event": "daemon", "why": "' + "x" * 1000 + '"}\n'
    home.paths.events.write_text(line * 200)
    read, write = os.pipe()
    os.close(read)
    with serving(home.paths, FakeStack(*services)):
        done = subprocess.run(
            [LLMSUP, *verb], env=home.environ, stdout=write, stderr=subprocess.PIPE, timeout=30,
            check=False,
        )  # fmt: skip
    os.close(write)

    assert (done.returncode, done.stderr) == (141, b"")


def test_what_is_unexpected_is_one_line_and_a_file(home: Home) -> None:
    """Given a directory where the event journal should be."""
    home.paths.create()
    home.paths.events.mkdir()

    result = home.cli("events")

    log = home.paths.logs / "crash.log"
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: unexpected IsADirectoryError")
    assert result.stderr.endswith(f"hint: this is a bug; its traceback is in {log}\n")
    assert "Traceback (most recent call last)" in log.read_text()


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["status", "--nonsense"], ["status", "--watch"], ["logs"]]
)
def test_usage_errors_are_two(home: Home, arguments: list[str]) -> None:
    result = home.cli(*arguments)

    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


def test_help_and_version(home: Home) -> None:
    listed = home.cli("--help")

    assert listed.returncode == 0
    verbs = ("start", "stop", "restart", "status", "logs", "events", "upstreams", "profile")
    for verb in verbs:
        assert f"\n  {verb} " in listed.stdout
        assert home.cli(verb, "--help").returncode == 0
    assert home.cli("--version").stdout == "llmsup 0.1.0\n"


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
