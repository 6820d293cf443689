"""How the command line speaks: usage errors, outputs that break, encodings, completion."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import termios

import pytest

from llmsup.cli import terminal
from tests.fake_daemon import FakeStack, service, serving
from tests.home import LLMSUP, Home


@pytest.mark.parametrize("verb", [["status", "--json"], ["events"]])
def test_a_reader_that_goes_away_is_no_error(home: Home, verb: list[str]) -> None:
    services = [service(f"chat{number}", why="x" * 1000) for number in range(200)]
    home.paths.create()
    line = '{"time": 1, "at_s": 1, "event": "daemon", "why": "' + "x" * 1000 + '"}\n'
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
    ("arguments", "said"),
    [
        (["nonsense"], "error: no such command 'nonsense'\nhint: llmsup -h\n"),
        (["status", "--nope"], "error: no such option: --nope\nhint: llmsup status -h\n"),
        (["logs"], "error: missing argument 'SERVICE'\nhint: llmsup logs -h\n"),
        (["status", "--watch"], "error: --watch needs a terminal\n"),
        (["start", "--timeout", "5"], "error: invalid value for '--timeout': expected a duration"),
        (["start", "--foreground", "--no-wait"], "error: --foreground excludes --no-wait"),
        (["start", "--foreground", "--timeout", "5s"], "error: --foreground excludes"),
    ],
)
def test_usage_errors_are_a_line_and_a_hint(home: Home, arguments: list[str], said: str) -> None:
    result = home.cli(*arguments)

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 2


def test_help_and_version(home: Home) -> None:
    listed = home.cli("--help")

    assert listed.returncode == 0
    verbs = ("start", "stop", "restart", "status", "logs", "events", "upstreams", "profile")
    for verb in verbs:
        assert f"\n  {verb} " in listed.stdout
        assert home.cli(verb, "--help").returncode == 0
        assert "<" not in home.cli("help", verb).stdout
    for version in ("--version", "-V", "version"):
        assert home.cli(version).stdout == "llmsup 0.1.0\n"


def test_without_arguments_the_help_is_shown(home: Home) -> None:
    result = home.cli()

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: llmsup ")


# --- outputs that break


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status"], 4),
        (["status", "--json"], 4),
        (["events"], 1),
        (["logs", "chat"], 1),
        (["upstreams"], 1),
        (["start", "--help"], 1),
        (["--version"], 1),
    ],
)
def test_a_full_disk_is_named(home: Home, arguments: list[str], code: int) -> None:
    home.paths.create()
    home.paths.events.write_text('{"time": 1, "at_s": 1, "event": "daemon"}\n')
    home.paths.service_log("chat").write_text("one\n")
    with serving(home.paths, FakeStack(service("chat"))):
        done = shell(home, 'exec "$0" "$@" >/dev/full', *arguments)

    words = "error: cannot write the output: No space left on device\n"
    assert (done.returncode, done.stderr) == (code, words)


def test_a_closed_output_is_quiet(home: Home) -> None:
    with serving(home.paths, FakeStack(service("chat"))):
        done = shell(home, 'exec "$0" "$@" >&-', "status")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_whoever_cannot_hear_us_still_gets_the_exit_status(home: Home, redirection: str) -> None:
    done = shell(home, f'exec "$0" "$@" {redirection}', "status")

    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_closed_stderr_does_not_end_a_command(home: Home) -> None:
    read, write = os.pipe()
    os.close(read)
    with serving(home.paths, FakeStack(service("chat"))):
        done = subprocess.run(
            [LLMSUP, "stop"], env=home.environ, stdout=subprocess.PIPE, stderr=write, timeout=30,
            check=False,
        )  # fmt: skip
    os.close(write)

    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("verb", [["status"], ["status", "--json"]])
def test_an_encoding_that_lacks_characters_is_no_error(home: Home, verb: list[str]) -> None:
    home.environ["PYTHONIOENCODING"] = "ascii"
    with serving(home.paths, FakeStack(service("chat", why="größer"))):
        done = home.cli(*verb)

    assert (done.returncode, done.stderr) == (0, "")
    assert ("gr\\u00f6\\u00dfer" if "--json" in verb else "gr??er") in done.stdout


# --- what is wrong outside


@pytest.mark.parametrize("verb", ["status", "start", "stop", "events", "logs"])
def test_a_home_of_nobody_is_no_traceback(home: Home, verb: str) -> None:
    home.environ["LLMSUP_HOME"] = "~nosuchuser/x"

    result = home.cli(verb, *(["chat"] if verb == "logs" else []))

    assert result.returncode in {1, 2, 4}
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("length", [120, 5000])
def test_a_home_whose_path_is_too_long_is_named(home: Home, length: int) -> None:
    home.environ["LLMSUP_HOME"] = f"{home.root}/{'x' * length}"

    result = home.cli("status")

    assert result.returncode == 4
    assert result.stderr.startswith("error: /")
    assert "too long a path for Unix sockets\nhint: set LLMSUP_HOME" in result.stderr


def test_a_traceback_that_cannot_be_kept_is_no_traceback(home: Home) -> None:
    """Given a directory where the event journal should be, and no directory for logs."""
    home.paths.create()
    home.paths.events.mkdir()
    home.paths.logs.rmdir()
    home.paths.logs.write_text("")

    result = home.cli("events")

    assert result.returncode == 1
    assert "its traceback could not be kept" in result.stderr
    assert result.stderr.count("\n") == 2


def test_a_status_that_breaks_says_nothing_of_the_stack(home: Home) -> None:
    stack = FakeStack(service("chat"))
    stack.is_broken = True
    with serving(home.paths, stack):
        result = home.cli("status")

    assert result.returncode == 4
    assert result.stderr.startswith("error: the daemon broke: RuntimeError")


# --- terminals


def test_the_width_is_that_of_the_terminal_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "w") as stream:
        assert terminal.width(stream) == terminal.WIDTH_UNKNOWN
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))
        assert terminal.width(stream) == 70
    assert terminal.width(io.StringIO()) is None
    assert terminal.width(None) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("llmsup stop c", "chat\ncode"),
        ("llmsup logs d", "daemon"),
        ("llmsup start mi", "mine"),
        ("llmsup stop x", ""),
    ],
)
def test_completion(home: Home, words: str, expected: str) -> None:
    home.paths.create()
    home.paths.daemon_log.touch()
    home.paths.profiles.mkdir()
    (home.paths.profiles / "mine.toml").touch()
    home.environ |= {
        "_LLMSUP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    with serving(home.paths, FakeStack(service("chat"), service("code"))):
        result = home.cli()

    assert (result.stdout.strip(), result.stderr) == (expected, "")


def test_completion_without_a_daemon_offers_nothing(home: Home) -> None:
    home.environ |= {
        "_LLMSUP_COMPLETE": "complete_bash", "COMP_WORDS": "llmsup stop c", "COMP_CWORD": "2",
    }  # fmt: skip

    result = home.cli()

    assert (result.stdout.strip(), result.stderr) == ("", "")


def shell(home: Home, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of shell with `llmsup` and the arguments as $0 and $@."""
    return subprocess.run(
        ["sh", "-c", script, LLMSUP, *arguments],
        env=home.environ, cwd=home.root, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
