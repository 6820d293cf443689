"""The daemon dies; the stack goes on; a new daemon takes it over."""

import asyncio
import json
import os
import signal
import socket

import pytest

from bench.load import Load, chat_body
from tests.home import Home, is_alive, wait_until
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
        lambda: b'"is_stopped":true' in home.paths.memory.read_bytes(), "the memory of the stop"
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
        lambda: b'"is_stopped":true' in home.paths.memory.read_bytes(), "the memory of the stop"
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
