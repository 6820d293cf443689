"""`llmsup start` as a process: what it refuses, what it waits for, what keeps a daemon down."""

import signal
import subprocess

import pytest

from llmsup.config.files import digest
from llmsup.host import ports
from llmsup.host.process import marked
from llmsup.preflight import load_startable
from tests.disk import small_disk
from tests.fake_daemon import FakeStack, service, serving
from tests.home import Home, free_ports, stub, wait_until
from tests.process.test_cli_status import running


def test_start_gives_up_in_time_and_leaves_the_stack_up(home: Home) -> None:
    stack = FakeStack(service("chat", "starting", why="loading"))
    with serving(home.paths, stack):
        result = home.cli("start", "--timeout", "100ms")

    assert result.returncode == 1
    words = "error: not ready within 100ms: chat (starting: loading)\nhint: the stack stays"
    assert words in result.stderr
    assert stack.asked == [("start", (), False)]


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        ("--- code, generation 1\nno such model\n", "llmsup logs code"),
        ("--- code, generation 1\n", "llmsup status shows it"),
        (None, "llmsup status shows it"),
    ],
)
def test_start_ends_with_the_reason_of_a_failed_service(
    home: Home, output: str | None, hint: str
) -> None:
    """Given a process that said nothing, or none at all, its log is not what to look at."""
    home.paths.create()
    if output:
        home.paths.service_log("code").write_text(output)
    stack = FakeStack(service("chat"), service("code", "failed", pid=None, why="no such model"))
    with serving(home.paths, stack):
        result = home.cli("start")

    assert result.returncode == 1
    assert "error: code failed: no such model\n" in result.stderr
    assert result.stderr.endswith(f"{hint}\n")


def test_interrupting_a_start_leaves_the_stack_up_and_says_so(home: Home) -> None:
    stack = FakeStack(service("chat", "starting"))
    with (
        serving(home.paths, stack),
        running(home, "start", stderr=home.root / "said") as process,
    ):
        wait_until(lambda: "starting" in (home.root / "said").read_text(), "progress")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130

    assert "the stack keeps coming up" in (home.root / "said").read_text()
    assert "Traceback" not in (home.root / "said").read_text()
    assert stack.asked == [("start", (), False)]


# --- a stack that is up


@pytest.mark.parametrize(
    ("arguments", "overrides", "said"),
    [
        (["--set", "a=b"], [], "error: demo is up with no --set\n"),
        (["--set", "a=b"], ["a=c"], "error: demo is up with --set a=c\n"),
        (["demo.toml"], ["a=c"], "error: demo is up with --set a=c\n"),
        (["other.toml"], [], "error: demo is up, not other\n"),
        (["mine"], [], "error: demo is up, not mine\n"),
    ],
)
def test_start_refuses_to_change_a_stack_that_is_up(
    home: Home, arguments: list[str], overrides: list[str], said: str
) -> None:
    """Given a profile by its name, it is not even read: it may be of another machine."""
    (home.root / "other.toml").write_text(home.command("chat", ["sleep", "600"]))
    stack = up(home, overrides)
    home.paths.profiles.mkdir(parents=True)
    (home.paths.profiles / "mine.toml").write_text("nonsense")
    with serving(home.paths, stack):
        result = home.cli("start", *arguments)

    assert (result.returncode, stack.asked) == (1, [])
    assert result.stderr.startswith(said)
    assert "hint: llmsup stop" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ([], []),
        ([], ["a=b"]),
        (["demo.toml"], []),
        (["link.toml"], []),
        (["--set", "a=b"], ["a=b"]),
        (["demo.toml", "--set", "c=d", "--set", "a=b"], ["a=b", "c=d"]),
    ],
)
def test_start_of_the_same_again_is_no_change(
    home: Home, arguments: list[str], overrides: list[str]
) -> None:
    stack = up(home, overrides)
    (home.root / "link.toml").symlink_to(home.root / "demo.toml")
    with serving(home.paths, stack):
        result = home.cli("start", *arguments)

    assert (result.returncode, result.stderr) == (0, "already up: demo, 1 service\n")


@pytest.mark.parametrize("arguments", [[], ["demo.toml"]])
def test_a_profile_that_was_edited_is_not_what_is_up(home: Home, arguments: list[str]) -> None:
    stack = up(home, [])
    (home.root / "demo.toml").write_text("edited")
    with serving(home.paths, stack):
        result = home.cli("start", *arguments)

    assert (result.returncode, stack.asked) == (1, [])
    assert result.stderr == (
        f"error: {home.root / 'demo.toml'} has changed since the start\nhint: llmsup reload\n"
    )


def test_two_starts_at_once_are_one_stack(home: Home) -> None:
    """Given different profiles, the loser does not take the other's stack for its own."""
    texts = {name: home.command(name, ["sleep", "600"]) for name in ("one", "two")}
    for name, text in texts.items():
        home.write(text).rename(home.root / f"{name}.toml")
    said = {name: home.root / f"{name}.said" for name in texts}
    with (
        running(home, "start", "one.toml", stderr=said["one"]) as one,
        running(home, "start", "two.toml", stderr=said["two"]) as two,
    ):
        codes = {"one": one.wait(60), "two": two.wait(60)}
    words = {name: path.read_text() for name, path in said.items()}
    winner, loser = sorted(codes, key=lambda name: codes[name])

    assert codes == {winner: 0, loser: 1}, words
    assert home.status()["daemon"]["profile"] == winner
    assert f"up: {winner}, 1 service ready" in words[winner]
    assert f"error: {winner} is up, not {loser}\n" in words[loser]


# --- what keeps a daemon from coming up


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


def test_a_holder_that_ends_while_it_is_looked_at_holds_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a server of ours that is being ended: its mark is gone before its socket is."""
    (port,) = free_ports(1)
    home.write(home.command("chat", stub("upstream.py", "--port", port), port=port))
    with subprocess.Popen(stub("upstream.py", "--port", port, "--name", "x")) as ending:

        def look(prefix: str) -> list[int]:
            ending.kill()
            ending.wait()
            return marked(prefix)

        monkeypatch.setattr("llmsup.preflight.marked", look)
        wait_until(lambda: bool(ports.owners(port)), "the port is taken")
        loaded = load_startable(
            str(home.profile), environ=home.environ, overrides=(), home=home.paths
        )
    assert loaded.profile.service["chat"].port == port


def test_a_daemon_that_ends_at_once_is_an_error_in_its_words(home: Home) -> None:
    """Given a lock file that is a link, which the daemon refuses."""
    home.write(home.command("chat", ["sleep", "60"]))
    home.paths.create()
    home.paths.lock.symlink_to(home.root / "elsewhere")

    result = home.cli("start", str(home.profile))

    assert result.returncode == 1
    assert result.stderr == (
        "error: the daemon ended at once: cannot open the lock "
        f"{home.paths.lock}: it is a symbolic link\n"
        "hint: it must be a plain file of yours; remove what is there\n"
    )


def test_a_log_level_that_is_none_is_refused_before_there_is_a_daemon(home: Home) -> None:
    home.write(home.command("chat", ["sleep", "600"]))
    home.environ["LLMSUP_LOG"] = "bogus"

    result = home.cli("start", str(home.profile))

    assert (result.returncode, result.stderr) == (
        2, "error: LLMSUP_LOG is bogus, which is no level\n"
        "hint: one of debug, info, warning, error\n",
    )  # fmt: skip
    assert not home.paths.daemon_log.exists()


def test_a_full_disk_is_named() -> None:
    with small_disk("tmpfs", size_mib=1) as disk:
        home = Home(disk.path)
        home.write(home.command("chat", ["sleep", "600"]))
        home.paths.create()
        disk.fill()

        result = home.cli("start", str(home.profile))

        assert result.returncode == 1
        assert result.stderr.startswith(
            f"error: cannot write {home.paths.daemon_log}: No space left on device\nhint: make room"
        )
        assert home.daemon_pid() is None


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_nothing_of_the_working_directory_is_run(home: Home, options: list[str]) -> None:
    """Given a project with a logging.py of its own, a start in its directory is not disturbed."""
    home.write(home.command("chat", ["sleep", "600"]))
    (home.root / "logging.py").write_text("raise SystemExit('foreign code')")
    with running(home, "start", str(home.profile), *options, stderr=home.root / "said") as process:
        wait_until(home.paths.control_socket.exists, "the daemon's socket")
        home.wait_state("chat", "ready")
        result = home.cli("stop")
        process.wait(30)

    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, "stopped: test (1 service)")
    assert "foreign code" not in (home.root / "said").read_text()


def test_ctrl_c_before_the_daemon_answers_says_that_it_goes_on(home: Home) -> None:
    """Given a daemon that takes its time to come up, a start that is interrupted."""
    home.write(home.command("chat", ["sleep", "600"]))
    go, said = home.root / "go", home.root / "said"
    (home.root / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        f"while 'llmsup.daemon' in sys.orig_argv and not os.path.exists({str(go)!r}):\n"
        "    time.sleep(0.01)\n"
    )
    home.environ["PYTHONPATH"] = str(home.root)
    with running(home, "start", str(home.profile), stderr=said) as process:
        wait_until(lambda: "--- daemon" in home.daemon_log(), "the daemon's process")
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(10) == 130
        finally:
            go.touch()
    wait_until(home.paths.control_socket.exists, "the daemon's socket")

    assert said.read_text() == (
        "the stack keeps coming up: llmsup status shows it, llmsup stop ends it\n"
    )
    assert home.cli("stop", "--now").returncode == 0


def up(home: Home, overrides: list[str]) -> FakeStack:
    """A stack that is up with demo.toml."""
    profile = home.root / "demo.toml"
    profile.write_text("as it was")
    stack = FakeStack(service("gateway"), service("chat"))
    stack.snapshot["daemon"] |= {
        "profile_path": str(profile),
        "profile_digest": digest(profile),
        "overrides": overrides,
    }
    stack.start = lambda services: {"changed": [], "message": ""}  # type: ignore[method-assign]
    return stack
