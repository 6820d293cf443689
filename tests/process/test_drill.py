"""`llmsup drill` on a real daemon with stub servers: judged, written down, and mended again."""

import fcntl
import json
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmsup.host import procfs
from tests.home import LLMSUP, Home, free_ports, stub, wait_until
from tests.process.test_stack import dual

RESTART = {"backoff": "100ms", "max_deaths": 4}


def drill(home: Home, *names: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and the scenarios of the evidence by name."""
    result = home.cli("drill", *names, "--json", timeout_s=100)
    assert result.stdout, result.stderr
    document = json.loads(result.stdout)
    return result.returncode, {each["scenario"]: each for each in document["scenarios"]}


def lone(home: Home) -> None:
    """One server, and nobody to stand in for it."""
    (port,) = free_ports(1)
    command = stub("upstream.py", "--port", port, "--name", "chat")
    readiness = {"http_get": "/health", "period": "200ms"}
    text = home.command("chat", command, port=port, readiness=readiness, restart=RESTART)
    home.write(text + '[route.chat]\nservices = ["chat"]\n')


@contextmanager
def drilling(home: Home, *names: str) -> Iterator[subprocess.Popen[str]]:
    """A drill in the background; it ends with the block."""
    with subprocess.Popen(
        [LLMSUP, "drill", *names],
        env=home.environ, cwd=home.root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def is_stopped(pid: int) -> bool:
    return procfs.read(pid, "stat").rpartition(b")")[2].split()[:1] == [b"T"]


def file_limit(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_FSIZE)


def test_the_servers_may_die(home: Home) -> None:
    dual(home, restart=RESTART)
    home.start()
    code, seen = drill(home, "crashloop", "kill", "load")
    assert {name: each["outcome"] for name, each in seen.items()} == {
        "load": "passed",
        "kill": "passed",
        "crashloop": "passed",
    }, {name: each["line"] for name, each in seen.items()}
    assert code == 0
    assert list(seen) == ["load", "kill", "crashloop"], "in the order of the table"
    assert seen["kill"]["failed_requests"] == 0
    assert "answered meanwhile by code" in seen["kill"]["line"]
    assert any(each.get("state") == "failed" for each in seen["crashloop"]["events"])
    assert home.cli("status").returncode == 0


def test_the_daemon_may_die_and_the_disk_be_full(home: Home) -> None:
    dual(home)
    home.start()
    code, seen = drill(home, "daemon", "disk")
    assert code == 0, {name: each["line"] for name, each in seen.items()}
    before, after = seen["daemon"]["status_before"], seen["daemon"]["status_after"]
    assert before["daemon"]["pid"] != after["daemon"]["pid"]
    assert [each["pid"] for each in before["services"]] == [
        each["pid"] for each in after["services"]
    ]
    daemon = home.daemon_pid()
    assert daemon is not None
    assert file_limit(daemon) == file_limit(0), "as it was"
    assert home.cli("status").returncode == 0


def test_what_breaks_while_the_gateway_is_away_is_counted(home: Home) -> None:
    dual(home)
    home.start()
    _, seen = drill(home, "gateway")
    gateway = seen["gateway"]
    late = [each["bound"] for each in gateway["findings"] if not each["holds"]]
    assert late in ([], ["within 0.30 s"]), gateway["line"]  # this machine may be busy
    assert gateway["failed_requests"] > 0
    assert "refused" in gateway["line"] or "reset" in gateway["line"]


def test_a_lone_server_is_waited_for_and_only_killed_when_asked_for(home: Home) -> None:
    lone(home)
    home.start()
    code, seen = drill(home, "kill")
    assert code == 0, seen["kill"]["line"]
    assert seen["kill"]["line"].startswith("0 of ")
    generation = home.service("chat")["generation"]
    with drilling(home) as running:
        assert running.stdout is not None
        lines = {line.split()[0]: line for line in running.stdout}
    assert "skipped" in lines["kill"]
    assert "only chat answers chat" in lines["kill"]
    assert "passed" in lines["load"]
    assert home.service("chat")["generation"] == generation


def test_the_evidence_is_for_people_too(home: Home) -> None:
    dual(home)
    home.start()
    out = home.root / "evidence"
    result = home.cli("drill", "kill", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("kill       passed   0 of ")
    assert str(out) in result.stderr
    text = (out / "drill.md").read_text()
    assert result.stdout.strip().partition("passed")[2].strip() in text
    assert "kill -9 $(llmsup status --json" in text
    document = json.loads((out / "drill.json").read_text())
    assert document["profile"]["sha256"] == home.status()["daemon"]["profile_digest"]
    again = home.cli("drill", "kill", "--out", str(out))
    assert again.returncode == 1
    assert "holds the evidence of another drill" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_hang_leaves_the_server_running(home: Home, number: int) -> None:
    dual(home)
    home.start()
    pid = home.service("chat")["pid"]
    with drilling(home, "hang") as running:
        wait_until(lambda: is_stopped(pid), "the stop")
        running.send_signal(number)
        output, _ = running.communicate(timeout=30)
    assert running.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    wait_until(lambda: not is_stopped(pid), "the server going on")
    home.wait_state("chat", "ready")
    assert json.loads(evidence(home).read_text())["interrupted"]


def test_an_interrupted_full_disk_is_one_no_more(home: Home) -> None:
    dual(home)
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    with drilling(home, "disk") as running:
        wait_until(lambda: file_limit(daemon)[0] == 0, "the limit")
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=30)
    assert running.returncode == 130, output
    assert file_limit(daemon) == file_limit(0)
    home.wait_state("chat", "ready")


def test_an_interrupted_crash_loop_is_forgiven(home: Home) -> None:
    dual(home, restart=RESTART)
    home.start()
    with drilling(home, "crashloop") as running:
        wait_until(lambda: home.service("chat")["generation"] > 2, "a few deaths")
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=30)
    assert running.returncode == 130, output
    home.wait_state("chat", "ready", deadline_s=30)


def evidence(home: Home) -> Path:
    (found,) = (home.paths.state / "drills").glob("*/drill.json")
    return found


def test_it_refuses_what_would_prove_nothing(home: Home) -> None:
    result = home.cli("drill")
    assert (result.returncode, result.stderr) == (
        3,
        "error: llmsup is not running\nhint: llmsup start\n",
    )
    result = home.cli("drill", "earthquake")
    assert result.returncode == 2
    assert "unknown scenario: earthquake" in result.stderr
    dual(home, restart={"backoff": "0s", "max_deaths": 1000})
    home.start()
    result = home.cli("drill", "crashloop")
    assert result.returncode == 1
    assert "max_deaths of chat is 1000" in result.stderr
    with (home.paths.state / "drill.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = home.cli("drill", "load")
    assert result.returncode == 1
    assert "a drill is on already" in result.stderr
    home.profile.write_text(home.profile.read_text() + "# changed\n")
    result = home.cli("drill", "daemon")
    assert result.returncode == 1
    assert "has changed since the start" in result.stderr


def test_it_refuses_a_stack_that_is_not_whole(home: Home) -> None:
    (port,) = free_ports(1)
    home.write(
        home.command(
            "slow",
            stub("children.py", "never-ready", "--port", port),
            port=port,
            readiness={"http_get": "/health"},
        )
    )
    home.start("--no-wait")
    result = home.cli("drill")
    assert result.returncode == 1
    assert "error: the stack is not whole: slow is starting" in result.stderr
