"""Every death leaves a cause, a crash bundle and an account of it, and costs the stack nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmsup.host import bundles
from tests.home import Home, free_ports, stub, wait_until
from tests.process.test_adoption import kill_daemon
from tests.process.test_misbehaving_children import QUICK, child, up

KEY = "sk-gateway-Zx81"
TOKEN = "hf_Secret0815"
NEVER_AGAIN = {"policy": "never"}


def deaths(home: Home, service: str, count: int = 1) -> list[dict[str, Any]]:
    """The last deaths of a service, the newest first, once `count` bundles are there."""

    def found() -> list[bundles.Bundle]:
        return [each for each in bundles.found(home.paths.crashes) if each.service == service]

    wait_until(lambda: len(found()) >= count, f"{count} bundles of {service}: {home.daemon_log()}")
    result = home.cli("why", service, "-n", "99", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    answer: list[dict[str, Any]] = json.loads(result.stdout)["deaths"]
    return answer


def modes(directory: Path) -> set[int]:
    return {each.stat().st_mode & 0o777 for each in directory.iterdir()}


def test_a_kill_leaves_a_bundle_that_only_its_owner_can_read(home: Home) -> None:
    (port,) = free_ports(1)
    up(home, child(home, "chat", "ok", "--port", port, port=port))
    old = home.wait_state("chat", "ready")
    os.kill(old["pid"], signal.SIGKILL)
    home.wait_replaced(old)
    (death,) = deaths(home, "chat")
    assert death["cause"] == "killed by somebody"
    assert (death["reason"], death["signal"], death["code"]) == (
        "killed by SIGKILL",
        "SIGKILL",
        None,
    )
    assert (death["generation"], death["next"]) == (1, "restarted at once")
    assert death["output"] == [f"listening on {port}"]
    assert death["argv"][1:] == [*stub("children.py", "ok")[1:], "--port", str(port)]
    assert 0 < death["lived_s"] < 60
    memory = death["memory"]
    assert 0 < memory["available_bytes"] < memory["total_bytes"]
    assert death["binary"]["size_bytes"] == Path(death["argv"][0]).stat().st_size
    assert "PATH" in death["inherited"]
    bundle = Path(death["bundle"])
    assert bundle.name.endswith("Z-chat-1")
    assert bundle.stat().st_mode & 0o777 == 0o700
    assert home.paths.crashes.stat().st_mode & 0o777 == 0o700
    assert modes(bundle) == {0o600}
    (event,) = [each for each in home.events() if each["event"] == "death"]
    assert (event["service"], event["cause"]) == ("chat", "killed by somebody")
    said = home.cli("events").stdout
    (line,) = [each for each in said.splitlines() if "death of generation 1 after " in each]
    assert line.endswith("s  killed by somebody; restarted at once")


def test_why_is_told_at_a_glance_with_and_without_a_daemon(home: Home) -> None:
    (port,) = free_ports(1)
    up(home, child(home, "chat", "ok", "--port", port, port=port))
    old = home.wait_state("chat", "ready")
    alive, nothing = home.cli("why", "chat").stdout.splitlines()
    assert alive.startswith(f"chat is ready (generation 1, pid {old['pid']}, up ")
    assert nothing == "no death of chat is kept"
    os.kill(old["pid"], signal.SIGABRT)
    new = home.wait_replaced(old)
    (death,) = deaths(home, "chat")
    lines = home.cli("why", "chat").stdout.splitlines()
    assert lines[0].startswith(f"chat is ready (generation 2, pid {new['pid']}, up ")
    assert lines[2].endswith("  crashed")
    assert lines[3].startswith("  how     killed by SIGABRT")
    assert lines[3].endswith(f"listening on {port}")
    assert "  then    restarted at once" in lines
    assert f"  said    listening on {port}" in lines
    assert lines[-1] == f"  kept in {death['bundle']}"
    kill_daemon(home)
    result = home.cli("why", "chat")
    assert result.stdout.splitlines()[0] == "chat: no daemon keeps it at present"
    assert result.stdout.splitlines()[2:] == lines[2:]
    unknown = home.cli("why", "chatt")
    assert unknown.returncode == 2
    assert unknown.stderr == "error: unknown service: chatt\nhint: known services: chat, gateway\n"


def test_each_output_is_that_of_its_own_generation(home: Home) -> None:
    count = home.root / "count"
    script = f"echo x >> {count}; echo generation $(wc -l < {count}); exit 3"
    up(home, home.command("brief", ["sh", "-c", script], restart=QUICK))
    home.wait_state("brief", "failed")
    found = deaths(home, "brief", 3)
    assert [each["output"] for each in found] == [
        ["generation 3"], ["generation 2"], ["generation 1"],
    ]  # fmt: skip
    assert [each["generation"] for each in found] == [3, 2, 1]
    assert {each["cause"] for each in found} == {"exited"}
    assert {each["code"] for each in found} == {3}
    assert found[2]["next"] == "restarted at once"
    assert found[1]["next"].startswith("restarted after ")
    assert found[0]["next"] == "given up; tried again after 10m"


def test_one_that_stalls_is_told_with_the_signal_that_ended_it(home: Home) -> None:
    (port,) = free_ports(1)
    readiness = {"http_get": "/health", "period": "100ms"}
    restart = NEVER_AGAIN
    up(
        home,
        child(
            home, "mute", "never-ready", "--port", port,
            port=port, readiness=readiness, restart=restart,
        ),
    )  # fmt: skip
    home.wait_state("mute", "failed")
    (death,) = deaths(home, "mute")
    assert death["cause"] == "not ready in time"
    assert death["reason"].startswith("was not ready and showed no progress for 1s")
    assert death["signal"] == "SIGTERM"
    assert death["next"] == "given up: its restart policy is never"
    assert "stall_timeout" in death["hint"]
    assert death["lived_s"] > 0.9


def test_a_program_that_is_not_there_is_a_death_without_a_life(home: Home) -> None:
    up(home, home.command("ghost", [str(home.root / "nothing")]))
    home.wait_state("ghost", "failed")
    (death,) = deaths(home, "ghost")
    assert death["cause"] == "could not be started"
    assert death["reason"].startswith(f"cannot start {home.root}/nothing: No such file")
    assert (death["lived_s"], death["code"], death["signal"]) == (None, None, None)
    assert death["output"] == []
    assert death["next"] == "given up until llmsup start"
    assert "  lived   not at all (generation 1)" in home.cli("why", "ghost").stdout


def test_the_holder_of_a_port_is_named_when_the_server_reports_the_clash(home: Home) -> None:
    """Given a port that the profile does not know of, only the server can find it taken."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        said = f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {port}"
        program = (
            f"import socket, sys\ntry: socket.create_server(('127.0.0.1', {port}))\n"
            f"except OSError as error: sys.exit({said!r})"
        )
        up(home, home.command("late", [sys.executable, "-c", program], restart=NEVER_AGAIN))
        home.wait_state("late", "failed")
        (death,) = deaths(home, "late")
    assert death["cause"] == "port in use"
    assert f"port {port} is held by pid {os.getpid()} (" in death["reason"]
    assert "another `port`" in death["hint"]


def test_an_adopted_process_dies_with_its_own_output(home: Home) -> None:
    (port,) = free_ports(1)
    up(home, child(home, "chat", "ok", "--port", port, port=port))
    first = home.wait_state("chat", "ready")
    os.kill(first["pid"], signal.SIGKILL)
    old = home.wait_replaced(first)
    kill_daemon(home)
    home.start()
    assert home.wait_state("chat", "ready")["pid"] == old["pid"]
    os.kill(old["pid"], signal.SIGKILL)
    home.wait_replaced(old)
    death = deaths(home, "chat", 2)[0]
    assert death["cause"] == "unknown"
    assert (death["code"], death["signal"], death["generation"]) == (None, None, 2)
    assert death["output"] == [f"listening on {port}"], "and not that of generation 1"
    assert death["argv"] is not None, "it was launched as it would be now"
    assert 1 << 20 < death["memory"]["process_bytes"] < death["memory"]["total_bytes"]


def test_the_last_ten_are_kept_and_those_of_others_left_alone(home: Home) -> None:
    crashes = home.paths.crashes
    crashes.mkdir(parents=True, mode=0o700)
    for number in range(12):
        (crashes / f"202001{number + 10}T000000.000Z-brief-{number}").mkdir()
    (crashes / "20200110T000000.000Z-brief-two-7").mkdir()
    (crashes / ".20200110T000000.000Z-brief-99").mkdir()
    up(home, home.command("brief", ["sh", "-c", "exit 3"], restart=NEVER_AGAIN))
    home.wait_state("brief", "failed")
    wait_until(
        lambda: sum(each.service == "brief" for each in bundles.found(crashes)) == 10, "pruning"
    )
    names = sorted(each.name for each in crashes.iterdir())
    assert names[0] == "20200110T000000.000Z-brief-two-7", "of another service; no leftovers"
    assert names[-1].endswith("-brief-1")
    result = home.cli("why", "brief")
    assert result.returncode == 0
    assert result.stderr.count("cannot be read") == 2, "the empty ones of the three shown"


@pytest.mark.parametrize("trouble", ["not a directory", "full"])
def test_what_cannot_be_written_costs_the_evidence_only(home: Home, trouble: str) -> None:
    (port,) = free_ports(1)
    home.paths.state.mkdir(parents=True, mode=0o700)
    with no_room(home.paths.crashes, trouble):
        up(home, child(home, "chat", "ok", "--port", port, port=port))
        for _ in range(2):
            old = home.wait_state("chat", "ready")
            os.kill(old["pid"], signal.SIGKILL)
            home.wait_replaced(old)
        complaint = "crash bundles are not being written"
        wait_until(lambda: complaint in home.daemon_log(), "a word about it")
        assert home.cli("stop").returncode == 0
        assert home.paths.daemon_log.read_text().count(complaint) == 1, "said once"
        assert bundles.found(home.paths.crashes) == []
        if trouble == "full":
            assert [each.name for each in home.paths.crashes.iterdir()] == ["filler"]
    assert home.processes() == []


@contextmanager
def no_room(crashes: Path, trouble: str) -> Iterator[None]:
    if trouble == "not a directory":
        crashes.touch()
        yield
        return
    crashes.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=8", "tmpfs", str(crashes)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of our own cannot be mounted here")
    try:
        (crashes / "filler").write_bytes(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", str(crashes)], check=True)


def test_no_secret_gets_into_a_bundle(home: Home) -> None:
    keys = home.root / "keys.txt"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    script = f'echo "Authorization: Bearer {KEY}"; echo "token $$HF_TOKEN"; echo hello; exit 3'
    home.environ |= {"OTHER_API_KEY": "inherited-4711"}
    gateway = f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\napi_keys_file = "{keys}"\n'
    command = home.command(
        "leaky", ["sh", "-c", script, "--api-key", "argued-1234"],
        env={"HF_TOKEN": TOKEN, "PLAIN": "seen"}, restart=NEVER_AGAIN,
    )  # fmt: skip
    up(home, gateway, command)
    home.wait_state("leaky", "failed")
    (death,) = deaths(home, "leaky")
    assert death["env"] == {"HF_TOKEN": "***", "PLAIN": "seen"}
    assert death["output"] == ["Authorization: Bearer ***", "token ***", "hello"]
    assert {"OTHER_API_KEY", "PWD"} <= set(death["inherited"])
    for file in home.paths.crashes.rglob("*.*"):
        if file.is_file():
            text = file.read_text()
            assert text
            for secret in (KEY, TOKEN, "inherited-4711", "argued-1234"):
                assert secret not in text, file


def test_a_kill_of_the_kernel_for_memory_is_called_one(home: Home) -> None:
    """Given a service that moves into a control group of 40 MB and fills it."""
    with memory_group(40 << 20) as group:
        program = 'hoard = []\nwhile True: hoard.append(b"x" * (1 << 20))'
        script = f"echo $$$$ > {group}/cgroup.procs; exec {sys.executable} -c '{program}'"
        up(home, home.command("hog", ["sh", "-c", script], restart=NEVER_AGAIN))
        home.wait_state("hog", "failed")
        (death,) = deaths(home, "hog")
    assert death["signal"] == "SIGKILL"
    assert death["cause"] == "out of memory"
    assert "by the kernel" in death["reason"]


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    from llmsup.host.cgroup import memory_group as group_of  # noqa: PLC0415 - only here

    own = group_of(os.getpid())
    limit = "memory.limit_in_bytes" if own and (own / "memory.limit_in_bytes").exists() else None
    if own is None or limit is None or not os.access(own, os.W_OK):
        pytest.skip("no control group of our own can be made here")
    group = own / f"llmsup-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(limit_bytes))
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group's last process")
        group.rmdir()


@pytest.fixture(autouse=True)
def nothing_is_left(home: Home) -> Iterator[None]:
    yield
    if home.daemon_pid() is not None:
        assert home.cli("stop").returncode == 0
        assert home.processes() == []
