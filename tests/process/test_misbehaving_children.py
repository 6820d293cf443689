"""Children that break the rules end in the right state, with a sentence, and leave nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.home import Home, free_ports, is_alive, stub, wait_until

NO_PATIENCE = {"grace_period": "300ms", "drain_timeout": "300ms", "stall_timeout": "1s"}
QUICK = {"backoff": "50ms", "max_backoff": "100ms", "max_deaths": 3, "window": "10m"}


def up(home: Home, *services: str) -> None:
    """Start without waiting: these services never all become ready."""
    home.write("".join(services))
    home.start("--no-wait")


def child(home: Home, name: str, mode: str, *options: object, **keys: object) -> str:
    return home.command(name, stub("children.py", mode, *options), **(NO_PATIENCE | keys))


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


def stop_leaves_nothing(home: Home) -> None:
    result = home.cli("stop")
    assert result.returncode == 0, result.stderr
    assert home.processes() == []


def test_one_that_ignores_sigterm_is_killed_after_the_grace_period(home: Home, port: int) -> None:
    up(home, child(home, "deaf", "ignore-sigterm", "--port", port, port=port))
    pid = home.wait_state("deaf", "ready")["pid"]
    result = home.cli("stop", "deaf")
    assert result.returncode == 0, result.stderr
    assert not is_alive(pid)
    said = [e["state"] for e in home.events() if e.get("service") == "deaf" and "state" in e]
    assert said[-2:] == ["stopping", "stopped"]
    stop_leaves_nothing(home)


def test_grandchildren_die_with_it_even_those_in_sessions_of_their_own(
    home: Home, port: int
) -> None:
    up(home, child(home, "parent", "fork-grandchildren", "--port", port, port=port))
    pid = home.wait_state("parent", "ready")["pid"]
    log = home.paths.service_log("parent")
    near, far = map(int, log.read_text().splitlines()[1].split())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(near), "the grandchild in the group")
    wait_until(lambda: not is_alive(far), "the grandchild in a session of its own")
    home.wait_state("parent", "ready")
    stop_leaves_nothing(home)


def test_one_that_exits_at_once_is_failed_with_its_last_words(home: Home) -> None:
    count = home.root / "count"
    options = ("--code", 7, "--count", count)
    up(home, child(home, "brief", "exit-at-once", *options, restart=QUICK))
    why = home.wait_state("brief", "failed")["why"]
    assert why == (
        "exited with status 7: error: exiting with 7; 3 deaths within 10m, next try in 10m"
    )
    assert len(count.read_text().splitlines()) == 3
    assert "exiting with 7" in home.cli("status").stdout
    stop_leaves_nothing(home)


def test_one_that_never_becomes_ready_is_ended_and_says_for_how_long(home: Home, port: int) -> None:
    readiness = {"http_get": "/health", "period": "100ms"}
    up(
        home,
        child(
            home, "mute", "never-ready", "--port", port,
            port=port, readiness=readiness, restart=QUICK | {"max_deaths": 1},
        ),
    )  # fmt: skip
    why = home.wait_state("mute", "failed")["why"]
    assert why == (
        "was not ready and showed no progress for 1s: loading its model; "
        "1 death within 10m, next try in 10m"
    )
    stop_leaves_nothing(home)


def test_one_that_logs_our_own_probes_makes_no_progress_by_that(home: Home, port: int) -> None:
    """Given a server that answers 404 and logs each request, the stall timer still ends it."""
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    readiness = {"http_get": "/health", "period": "100ms"}
    up(
        home,
        home.command(
            "chatty", command, port=port, readiness=readiness,
            **(NO_PATIENCE | {"restart": QUICK | {"max_deaths": 1}}),
        ),
    )  # fmt: skip
    why = home.wait_state("chatty", "failed")["why"]
    assert why.startswith("was not ready and showed no progress for 1s: answered 404")
    stop_leaves_nothing(home)


def test_a_stop_is_over_when_nothing_is_left_of_the_service(home: Home, port: int) -> None:
    """Given a grandchild in a session of its own, it has ended when `llmsup stop` returns."""
    up(home, child(home, "parent", "fork-grandchildren", "--port", port, port=port))
    home.wait_state("parent", "ready")
    pids = home.paths.service_log("parent").read_text().splitlines()[1].split()
    assert home.cli("stop", "parent").returncode == 0
    assert not [pid for pid in map(int, pids) if is_alive(pid)]


def test_a_death_is_told_even_when_its_last_words_cannot_be_read(home: Home) -> None:
    """Given a log that was replaced by a directory, the exit is still seen and explained."""
    flag = home.root / "go"
    script = f"while ! test -e {flag}; do sleep 0.05; done; exit 3"
    up(home, home.command("brief", ["sh", "-c", script], restart=QUICK))
    home.wait_state("brief", "ready")
    log = home.paths.service_log("brief")
    log.unlink()
    log.mkdir()
    flag.touch()
    why = home.wait_state("brief", "failed")["why"]
    assert why.startswith("exited with status 3; ")
    troubles = home.status()["daemon"]["troubles"]
    assert troubles == ["the output of brief is not kept, until it is restarted: Is a directory"]
    died = next(e for e in home.events() if e.get("before") == "ready")
    assert died["why"].startswith("exited with status 3")
    log.rmdir()
    stop_leaves_nothing(home)


def test_one_that_loads_slowly_is_not_failed_while_it_makes_progress(home: Home, port: int) -> None:
    """Given a stall time-out of 1 s and a load of 3 s that fills memory, it becomes ready."""
    program = (
        "import time, threading; from tests.stubs.children import serve\n"
        "hoard = []\n"
        "def load():\n"
        "    for _ in range(60):\n"
        "        hoard.append(bytearray(1 << 20)); time.sleep(0.05)\n"
        "threading.Thread(target=load).start()\n"
        f"serve({port}, loading_s=3.0)\n"
    )
    command = [stub("children.py")[0], "-c", program]
    repository = str(Path(__file__).parents[2])
    up(
        home,
        home.command(
            "slow", command, port=port, env={"PYTHONPATH": repository},
            readiness={"http_get": "/health", "period": "100ms"}, **NO_PATIENCE,
        ),
    )  # fmt: skip
    service = home.wait_state("slow", "ready")
    assert service["generation"] == 1
    stop_leaves_nothing(home)


def test_a_flood_of_output_is_rotated_and_bounded(home: Home) -> None:
    up(home, child(home, "loud", "flood", "--bytes", 100 * 1024 * 1024))
    log = home.paths.service_log("loud")
    wait_until(lambda: log.exists() and b"done" in tail(log), "the flood's end", deadline_s=60.0)
    parts = home.paths.logs
    wait_until(
        lambda: sum(each.stat().st_blocks * 512 for each in parts.glob("loud.*")) < 45 << 20,
        "rotation",
    )
    assert home.service("loud")["state"] == "ready"
    assert home.cli("logs", "loud", "-n", "1").stdout.strip() == "done"
    stop_leaves_nothing(home)


def tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200))
        return file.read()


def test_a_port_held_by_another_service_is_named_with_its_holder(home: Home, port: int) -> None:
    up(
        home,
        child(home, "thief", "hold-port", "--port", port),
        child(home, "victim", "ok", "--port", port, port=port, depends_on=["thief"], restart=QUICK),
    )
    thief = home.wait_state("thief", "ready")["pid"]
    why = home.wait_state("victim", "failed")["why"]
    assert f"port {port} is held by pid {thief}" in why
    assert "children.py hold-port" in why
    stop_leaves_nothing(home)


def test_a_port_shared_by_a_stranger_is_never_ready(home: Home, port: int) -> None:
    """Given a stranger that joined the port by SO_REUSEPORT, the service must not get traffic."""
    up(
        home,
        child(
            home, "victim", "hold-port", "--port", port, port=port, stall_timeout="20s",
            readiness={"tcp": True, "period": "100ms", "success_threshold": 40},
        ),
    )  # fmt: skip
    home.wait_state("victim", "starting")
    stranger = subprocess.Popen(
        stub("children.py", "hold-port", "--port", port), stdout=subprocess.PIPE
    )
    try:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        probed = home.service("victim")["uptime_s"]
        wait_until(lambda: home.service("victim")["uptime_s"] > probed + 5, "more probes")
        assert home.service("victim")["state"] == "starting"
    finally:
        stranger.kill()
        stranger.wait()
        assert stranger.stdout is not None
        stranger.stdout.close()
    home.wait_state("victim", "ready")
    stop_leaves_nothing(home)


def test_a_missing_program_fails_at_once_and_says_what_to_do(home: Home) -> None:
    up(home, home.command("ghost", ["/no/such/program"]))
    why = home.wait_state("ghost", "failed")["why"]
    assert "/no/such/program" in why
    assert "No such file" in why
    assert home.service("ghost")["generation"] == 1
    assert home.cli("status").returncode == 1
    stop_leaves_nothing(home)


def test_words_of_another_program_do_not_make_its_death_permanent(home: Home) -> None:
    """Given a command that says what llama-server would, it is still tried again."""
    script = "echo 'warn: error: unknown argument: --foo (ignored)'; exit 1"
    up(home, home.command("other", ["sh", "-c", script], restart=QUICK))
    service = home.wait_state("other", "failed")
    assert service["generation"] == 3
    assert "next try in" in service["why"]


def test_one_that_stopped_itself_can_still_be_stopped(home: Home) -> None:
    up(home, child(home, "frozen", "hang"))
    home.wait_state("frozen", "ready")
    stop_leaves_nothing(home)


def test_no_zombie_is_left_by_a_crash_loop(home: Home) -> None:
    up(home, child(home, "brief", "exit-at-once", restart=QUICK))
    home.wait_state("brief", "failed")
    daemon = home.daemon_pid()
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    states = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children
    ]
    assert "Z" not in states
    stop_leaves_nothing(home)
