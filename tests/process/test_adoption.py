"""The daemon dies; the stack goes on; a new daemon takes it over."""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from llmsup.control.client import Client
from llmsup.drill.traffic import Load, chat_body
from llmsup.errors import LlmsupError
from tests.home import LLMSUP, STUBS, Home, free_ports, is_alive, stub, wait_until
from tests.process.test_stack import ask, dual


def kill_daemon(home: Home) -> None:
    """SIGKILL, and seen to be gone; everything else is left alone."""
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the daemon's end")


def pids(home: Home) -> dict[str, int]:
    return {each["service"]: each["pid"] for each in home.status()["services"]}


def test_a_new_daemon_adopts_what_is_alive(home: Home) -> None:
    dual(home)
    home.start()
    before = home.status()
    kill_daemon(home)
    assert ask(home)[1]["x-llmsup-service"] == "chat", "nothing needs the daemon to be served"
    home.start()
    after = home.status()
    for old, new in zip(before["services"], after["services"], strict=True):
        assert (new["pid"], new["generation"]) == (old["pid"], old["generation"])
        assert new["state"] == "ready"
    assert ask(home)[1]["x-llmsup-service"] == "chat"
    assert home.cli("stop").returncode == 0
    assert home.processes() == []


def test_an_adopted_server_that_dies_is_restarted(home: Home) -> None:
    """Given adopted processes, which are no children of the daemon, each death is still seen."""
    dual(home)
    home.start()
    kill_daemon(home)
    home.start()
    for name in ("chat", "gateway"):
        old = home.service(name)
        os.kill(old["pid"], signal.SIGKILL)
        new = home.wait_replaced(old)
        assert new["generation"] == old["generation"] + 1
    assert ask(home)[1]["x-llmsup-service"] == "chat"


def test_what_died_meanwhile_is_restarted_and_the_rest_kept(home: Home) -> None:
    dual(home)
    home.start()
    before = pids(home)
    kill_daemon(home)
    os.kill(before["chat"], signal.SIGKILL)
    wait_until(lambda: not is_alive(before["chat"]), "chat's end")
    assert ask(home)[1]["x-llmsup-service"] == "code", "Envoy goes on to the next by itself"
    home.start()
    after = pids(home)
    assert after["chat"] != before["chat"]
    assert (after["code"], after["gateway"]) == (before["code"], before["gateway"])
    assert home.service("chat")["generation"] == 2, "generations go on"


def test_a_server_whose_launch_changed_is_replaced(home: Home) -> None:
    dual(home)
    home.start()
    before = pids(home)
    kill_daemon(home)
    text = home.profile.read_text()
    home.profile.write_text(text.replace('"--name", "chat"', '"--name", "chat", "--delay-ms", "1"'))
    home.start()
    wait_until(lambda: home.service("chat")["generation"] == 2, "a new chat")
    chat = home.wait_state("chat", "ready")
    assert chat["pid"] != before["chat"]
    assert not is_alive(before["chat"])
    assert pids(home)["code"] == before["code"]


def test_what_the_profile_no_longer_wants_is_ended(home: Home) -> None:
    dual(home)
    home.start()
    before = pids(home)
    kill_daemon(home)
    text = home.profile.read_text()
    head, _, routes = text.partition("[service.code]")
    routes = routes[routes.index("[route") :].replace('["chat", "code"]', '["chat"]')
    home.profile.write_text(head + routes.replace('["code", "chat"]', '["chat"]'))
    home.start()
    wait_until(lambda: not is_alive(before["code"]), "code's end")
    assert pids(home)["chat"] == before["chat"]


def test_a_foreign_process_on_our_port_is_not_adopted(home: Home) -> None:
    """Given chat gone and a stranger on its port, the stranger is named and left alone."""
    chat, _ = dual(home)
    home.start()
    before = pids(home)
    kill_daemon(home)
    os.kill(before["chat"], signal.SIGKILL)
    wait_until(lambda: not is_alive(before["chat"]), "chat's end")
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", chat))
        stranger.listen()
        result = home.cli("start", str(home.profile))
        assert result.returncode == 2
        assert f"port {chat} is taken by pid {os.getpid()}" in result.stderr
    assert is_alive(before["code"])


@pytest.mark.parametrize("content", [b"", b"\0\xff garbage", b"{}", b'{"version": 9}', b"x" * 99])
def test_a_corrupt_memory_is_set_aside_and_nothing_is_lost(home: Home, content: bytes) -> None:
    dual(home)
    home.start()
    before = pids(home)
    kill_daemon(home)
    home.paths.memory.write_bytes(content)
    home.start()
    assert pids(home) == before
    assert home.paths.memory.with_suffix(".corrupt").read_bytes() == content
    assert "cannot be read" in home.daemon_log()


def test_a_stopped_service_stays_stopped(home: Home) -> None:
    """Given an operator's stop, a daemon that is replaced does not forget it."""
    dual(home)
    home.start()
    assert home.cli("stop", "code").returncode == 0
    wait_until(
        lambda: b'"asked":"down"' in home.paths.memory.read_bytes(), "the memory of the stop"
    )
    replace_daemon(home)
    home.wait_state("chat", "ready")
    assert home.service("code")["state"] == "stopped"


def replace_daemon(home: Home) -> None:
    result = home.cli("restart", "--daemon")
    assert result.returncode == 0, result.stderr + home.daemon_log()
    assert "replaced: daemon pid" in result.stderr


def test_a_start_brings_up_what_was_stopped_before_the_daemon_died(home: Home) -> None:
    dual(home)
    home.start()
    assert home.cli("stop", "code").returncode == 0
    wait_until(
        lambda: b'"asked":"down"' in home.paths.memory.read_bytes(), "the memory of the stop"
    )
    kill_daemon(home)
    home.start()
    assert home.service("code")["state"] == "ready"


def test_a_daemon_is_replaced_under_load_without_a_failed_request(home: Home) -> None:
    dual(home)
    home.start()
    before = pids(home)
    daemon = home.daemon_pid()

    async def run() -> Load:
        load = Load(home.gateway_port, chat_body("chat-7b"), clients=8)
        load.start()
        for _ in range(3):
            answered = len(load.records)
            await asyncio.to_thread(replace_daemon, home)
            while len(load.records) < answered + 100:
                await asyncio.sleep(0.01)
        await load.finish()
        return load

    load = asyncio.run(run())
    assert [record.error for record in load.records if record.failed] == []
    assert {record.service for record in load.records} == {"chat"}, "no list lost a ready service"
    assert pids(home) == before
    assert home.daemon_pid() == daemon, "replaced in place"
    assert json.loads(home.cli("status", "--json").stdout)["daemon"]["stopping"] is False
    assert home.cli("stop").returncode == 0
    assert home.processes() == []


def test_a_daemon_killed_while_stopping_leaves_nothing_stopped_for_the_next(home: Home) -> None:
    """Given SIGKILL in the middle of a stop, the next daemon brings everything up again."""
    dual(home, grace_period="20s")
    text = home.profile.read_text().replace("upstream.py", "deaf.py")
    home.profile.write_text(text)
    home.paths.create()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    home.profile.write_text(text.replace(str(STUBS / "deaf.py"), str(home.root / "deaf.py")))
    (home.root / "deaf.py").write_text(
        f"import runpy, sys\n{deaf}sys.argv[0] = {str(STUBS / 'upstream.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    os.kill(daemon, signal.SIGTERM)
    home.wait_state("chat", "stopping")
    kill_daemon(home)
    with foreground(home):
        for name in ("gateway", "chat", "code"):
            home.wait_state(name, "ready")


@contextmanager
def foreground(home: Home) -> Iterator[None]:
    """`llmsup start --foreground`, as systemd does it."""
    with subprocess.Popen(
        [LLMSUP, "start", str(home.profile), "--foreground"],
        env=home.environ, cwd=home.root, stderr=subprocess.DEVNULL,
    ) as daemon:  # fmt: skip
        try:
            # The socket of the daemon that was killed is still there: only an answer tells.
            wait_until(lambda: _answering_pid(home) == daemon.pid, "the daemon")
            yield
        finally:
            daemon.kill()


def _answering_pid(home: Home) -> int | None:
    try:
        return int(home.status()["daemon"]["pid"])
    except LlmsupError:
        return None


def test_a_profile_that_does_not_load_leaves_the_daemon_in_place(home: Home) -> None:
    dual(home)
    home.start()
    daemon, before = home.daemon_pid(), pids(home)
    home.profile.write_text("this is no TOML")
    result = home.cli("restart", "--daemon")
    assert result.returncode == 2
    assert (home.daemon_pid(), pids(home)) == (daemon, before)


def test_a_stop_during_the_hand_over_is_obeyed_by_the_new_daemon(home: Home) -> None:
    dual(home)
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    Client(home.paths).hand_over()
    os.kill(daemon, signal.SIGTERM)
    wait_until(lambda: not is_alive(daemon), "the daemon's end")
    assert home.processes() == []


def test_what_is_left_of_a_service_without_its_leader_is_ended(home: Home) -> None:
    """Given a shell that died with its server alive, the server does not hold the port for ever."""
    (port,) = free_ports(1)
    server = shlex.join(stub("upstream.py", "--port", port, "--name", "chat"))
    home.write(home.command("chat", ["sh", "-c", f"{server} & wait"], port=port))
    home.start()
    shell = home.service("chat")["pid"]
    kill_daemon(home)
    os.kill(shell, signal.SIGKILL)
    wait_until(lambda: not is_alive(shell), "the shell's end")
    home.start()
    assert home.wait_state("chat", "ready")["generation"] > 1


def test_a_helper_in_a_session_of_its_own_is_not_taken_for_the_service(home: Home) -> None:
    (port,) = free_ports(1)
    server = shlex.join(stub("upstream.py", "--port", port, "--name", "chat"))
    script = f"(setsid sleep 1000 &) ; exec {server}"
    home.write(home.command("chat", ["sh", "-c", script], port=port))
    home.start()
    before = home.service("chat")
    kill_daemon(home)
    home.start()
    after = home.wait_state("chat", "ready")
    assert (after["pid"], after["generation"]) == (before["pid"], before["generation"])
    assert home.cli("stop").returncode == 0
    assert home.processes() == []


def test_changed_launches_are_replaced_one_after_another_under_load(home: Home) -> None:
    """Given both services changed, no request fails: each is drained while the other answers."""
    dual(home)
    home.start()
    kill_daemon(home)
    text = home.profile.read_text()
    home.profile.write_text(text.replace('"--name"', '"--delay-ms", "1", "--name"'))

    async def run() -> Load:
        load = Load(home.gateway_port, chat_body("chat-7b"), clients=4)
        load.start()
        await asyncio.to_thread(home.start)
        for name in ("chat", "code"):
            await asyncio.to_thread(
                wait_until, partial(_has_generation, home, name, 2), f"a new {name}"
            )
        await load.finish()
        return load

    load = asyncio.run(run())
    assert [record.error for record in load.records if record.failed] == []


def _has_generation(home: Home, name: str, generation: int) -> bool:
    service = home.service(name)
    return bool(service["generation"] == generation and service["state"] == "ready")


def test_a_crash_loop_is_remembered(home: Home) -> None:
    """Given a service that had failed, a new daemon does not run the loop once more at once."""
    count = home.root / "count"
    command = stub("children.py", "exit-at-once", "--count", count)
    quick = {"backoff": "50ms", "max_backoff": "100ms", "max_deaths": 3}
    home.write(home.command("brief", command, restart=quick))
    home.start("--no-wait")
    home.wait_state("brief", "failed")
    wait_until(lambda: home.paths.memory.read_bytes().count(b".") >= 3, "the memory of the deaths")
    result = home.cli("restart", "--daemon")
    assert result.returncode == 0, result.stderr
    assert home.wait_state("brief", "failed")["why"].startswith("died under an earlier daemon")
    assert len(count.read_text().splitlines()) == 3
