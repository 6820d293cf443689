"""A real daemon with stub servers: it starts, heals, fails over, stops and leaves nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llmsup.control.client import Client
from tests.home import LLMSUP, Home, free_ports, is_alive, stub, wait_until


def dual(home: Home, **keys: object) -> tuple[int, int]:
    """A profile of two stub model servers, chat and code, that stand in for each other."""
    chat, code = free_ports(2)
    readiness = {"http_get": "/health", "period": "200ms"}
    keys = {"readiness": readiness, "grace_period": "2s", **keys}
    text = ""
    for name, port in (("chat", chat), ("code", code)):
        command = stub("upstream.py", "--port", port, "--name", name)
        text += home.command(name, command, port=port, **keys)
    text += '[route."chat-7b"]\nservices = ["chat", "code"]\naliases = ["gpt-4o-mini"]\n'
    text += '[route."code-7b"]\nservices = ["code", "chat"]\n'
    home.write(text)
    return chat, code


def ask(home: Home, model: str = "chat-7b") -> tuple[dict[str, Any], dict[str, str]]:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions",
        data=body,
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response), {k.lower(): v for k, v in response.headers.items()}


def health(home: Home) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{home.gateway_port}/health", timeout=5
        ) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@contextmanager
def restarting(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    """`llmsup restart` in the background; it ends with the block."""
    with subprocess.Popen(
        [LLMSUP, "restart"],
        env=home.environ, cwd=home.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as restart:  # fmt: skip
        try:
            yield restart
        finally:
            restart.kill()


def test_up_answers_and_stops_without_a_trace(home: Home) -> None:
    dual(home)
    result = home.cli("start", str(home.profile))
    assert result.returncode == 0, result.stderr + home.daemon_log()
    _, headers = ask(home)
    assert (headers["x-llmsup-service"], headers["x-llmsup-fallback"]) == ("chat", "false")
    _, headers = ask(home, "gpt-4o-mini")
    assert headers["x-llmsup-service"] == "chat"
    wait_until(lambda: health(home)[0] == 200, "health")
    assert home.cli("status").returncode == 0
    pids = [service["pid"] for service in home.status()["services"]] + [home.daemon_pid()]

    result = home.cli("stop")

    assert result.returncode == 0, result.stderr
    assert not [pid for pid in pids if is_alive(pid)]
    assert home.processes() == []
    assert home.cli("status").returncode == 3
    assert list(home.paths.runtime.iterdir()) == []


def test_a_killed_server_is_replaced_and_the_list_follows(home: Home) -> None:
    dual(home)
    home.start()
    first = home.service("chat")
    os.kill(first["pid"], signal.SIGKILL)
    _, headers = ask(home)
    assert headers["x-llmsup-service"] in {"chat", "code"}
    wait_until(lambda: home.service("chat")["pid"] not in {first["pid"], None}, "a new process")
    again = home.wait_state("chat", "ready")
    assert (again["generation"], again["restarts"]) == (first["generation"] + 1, 1)
    wait_until(lambda: ask(home)[1]["x-llmsup-service"] == "chat", "traffic back on chat")
    states = [
        (event["before"], event["state"])
        for event in home.events()
        if event["event"] == "state" and event["service"] == "chat"
    ]
    assert states == [
        ("stopped", "starting"),
        ("starting", "ready"),
        ("ready", "starting"),
        ("starting", "ready"),
    ]
    lists = [
        e["upstreams"]
        for e in home.events()
        if e.get("route") == "chat-7b" and e["event"] == "published"
    ]
    assert lists[-2:] == [["code"], ["chat", "code"]]


def test_a_fallback_answer_says_so(home: Home) -> None:
    dual(home)
    home.start()
    assert home.cli("stop", "chat").returncode == 0
    home.wait_state("chat", "stopped")
    _, headers = ask(home)
    assert (headers["x-llmsup-service"], headers["x-llmsup-fallback"]) == ("code", "true")


def test_health_names_what_is_not_ready(home: Home) -> None:
    dual(home, restart={"backoff": "60s", "max_backoff": "60s"})
    home.start()
    for _ in range(2):
        os.kill(home.wait_state("chat", "ready")["pid"], signal.SIGKILL)
        wait_until(lambda: home.service("chat")["state"] != "ready", "death seen")
    home.wait_state("chat", "backoff")
    wait_until(lambda: health(home)[0] == 503, "503")
    assert "chat" in health(home)[1]
    assert home.cli("status").returncode == 1


def test_a_killed_gateway_serves_again(home: Home) -> None:
    dual(home)
    home.start()
    os.kill(home.service("gateway")["pid"], signal.SIGKILL)
    wait_until(lambda: home.service("gateway")["generation"] == 2, "a new Envoy")
    home.wait_state("gateway", "ready")
    assert ask(home)[1]["x-llmsup-service"] == "chat"


def test_a_second_start_is_a_no_op_that_says_so(home: Home) -> None:
    dual(home)
    home.start()
    before = home.status()
    result = home.cli("start", str(home.profile))
    assert result.returncode == 0
    assert "already up" in result.stdout + result.stderr
    after = home.status()
    assert [s["pid"] for s in after["services"]] == [s["pid"] for s in before["services"]]


def test_two_daemons_on_one_home_cannot_run(home: Home) -> None:
    dual(home)
    home.start()
    result = subprocess.run(
        [sys.executable, "-m", "llmsup.daemon", "--profile", str(home.profile)],
        env=home.environ, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"another daemon (pid {home.daemon_pid()})" in result.stderr
    assert "Traceback" not in result.stderr
    assert ask(home)[1]["x-llmsup-service"] == "chat"


def test_stop_without_a_daemon_ends_the_leftovers(home: Home) -> None:
    dual(home)
    home.start()
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    assert home.processes()
    result = home.cli("stop")
    assert result.returncode == 0, result.stderr
    assert home.processes() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_whole_stack(home: Home, number: int) -> None:
    dual(home)
    home.start()
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, number)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    assert home.processes() == []


def test_a_restart_of_all_never_takes_a_route_away(home: Home) -> None:
    """Given two services that stand in for each other, both restarted in turn serve throughout."""
    dual(home)
    home.start()
    before = {s["service"]: s["generation"] for s in home.status()["services"]}
    answered = 0
    with restarting(home) as restart:
        while restart.poll() is None:
            ask(home)
            answered += 1
        assert restart.returncode == 0
    assert answered > 3
    after = {s["service"]: s["generation"] for s in home.status()["services"]}
    assert after == {name: n + (name != "gateway") for name, n in before.items()}


def slow_to_load(home: Home) -> None:
    """chat and code, each of which loads for two seconds: time to do something in between."""
    dual(home)
    text = home.profile.read_text().replace('"--name"', '"--load-s", "2", "--name"')
    home.profile.write_text(text)


def test_a_stop_during_a_restart_of_all_is_obeyed(home: Home) -> None:
    """Given a rolling restart that has come to chat, code stays down once it was stopped."""
    slow_to_load(home)
    home.start()
    with restarting(home) as restart:
        wait_until(lambda: home.service("chat")["state"] != "ready", "the restart of chat")
        Client(home.paths).stop(["code"])
        restart.wait(30)
    chat = home.wait_state("chat", "ready")
    assert chat["generation"] == 2
    code = home.service("code")
    assert (code["want"], code["state"], code["generation"]) == ("down", "stopped", 1)


def test_a_shutdown_during_a_restart_of_all_ends(home: Home) -> None:
    slow_to_load(home)
    home.start()
    with restarting(home) as restart:
        wait_until(lambda: home.service("chat")["state"] != "ready", "the restart of chat")
        result = home.cli("stop")
        assert result.returncode == 0, result.stderr
        restart.wait(30)
    assert home.processes() == []
    assert home.daemon_pid() is None


def test_a_restart_of_all_ends_at_one_that_does_not_come_back(home: Home) -> None:
    """Given chat's program gone since the start, code, which is fine, is left serving."""
    chat, code = free_ports(2)
    program = home.root / "program"
    program.write_text('#!/bin/sh\nexec "$@"\n')
    program.chmod(0o755)
    text = ""
    for name, port in (("chat", chat), ("code", code)):
        command = [str(program), *stub("upstream.py", "--port", port, "--name", name)]
        text += home.command(name, command, port=port, readiness={"http_get": "/health"})
    home.write(text + '[route."chat-7b"]\nservices = ["chat", "code"]\n')
    home.start()
    program.unlink()
    result = home.cli("restart")
    assert result.returncode == 1
    assert home.service("chat")["state"] == "failed"
    assert (home.service("code")["state"], home.service("code")["generation"]) == ("ready", 1)
    assert ask(home)[1]["x-llmsup-service"] == "code"


def test_a_daemon_without_descriptors_blames_no_service(home: Home) -> None:
    """Given a daemon that can open nothing, what it cannot probe stays as it was."""
    dual(home)
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    soft, hard = resource.prlimit(daemon, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (3, hard))
    try:
        said = home.paths.daemon_log
        wait_until(lambda: "could not be probed" in said.read_text(), "a probe that failed")
        seen = time.monotonic()
        wait_until(lambda: time.monotonic() > seen + 2.0, "ten more probes")
    finally:
        resource.prlimit(daemon, resource.RLIMIT_NOFILE, (soft, hard))
    assert [s["state"] for s in home.status()["services"]] == ["ready"] * 3
    assert [e for e in home.events() if e.get("state") == "unready"] == []


def test_dependents_wait_for_ready_and_stop_first(home: Home) -> None:
    """Given rag → embedding → qdrant, each starts once the one below is ready, stops before it."""
    ports = dict(zip(("qdrant", "embedding", "rag"), free_ports(3), strict=True))
    above = {"qdrant": [], "embedding": ["qdrant"], "rag": ["qdrant", "embedding"]}
    text = ""
    for name in ("rag", "embedding", "qdrant"):
        command = stub("upstream.py", "--port", ports[name], "--name", name, "--load-s", "0.3")
        text += home.command(
            name, command, port=ports[name], depends_on=above[name], grace_period="2s",
            readiness={"http_get": "/health", "period": "200ms"},
        )  # fmt: skip
    home.write(text)
    home.start()
    assert home.cli("stop").returncode == 0
    order = [
        (event["service"], event["state"])
        for event in home.events()
        if event["event"] == "state" and event["service"] != "gateway"
    ]
    assert order.index(("qdrant", "ready")) < order.index(("embedding", "starting"))
    assert order.index(("embedding", "ready")) < order.index(("rag", "starting"))
    assert order.index(("rag", "stopped")) < order.index(("embedding", "draining"))
    assert order.index(("embedding", "stopped")) < order.index(("qdrant", "draining"))


def test_independent_services_start_in_parallel(home: Home) -> None:
    dual(home)
    home.start()
    events = [(e["service"], e["state"]) for e in home.events() if e["event"] == "state"]
    assert events.index(("code", "starting")) < events.index(("chat", "ready"))


def test_a_bad_profile_leaves_the_stack_that_is_up_alone(home: Home) -> None:
    dual(home)
    home.start()
    before = [service["pid"] for service in home.status()["services"]]
    bad = home.root / "bad.toml"
    bad.write_text("[service.x]\nkind = 'command'\ncomand = ['true']\nport = 'eight'\n")
    result = home.cli("start", str(bad))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "comand" in result.stderr
    assert [service["pid"] for service in home.status()["services"]] == before
    assert ask(home)[1]["x-llmsup-service"] == "chat"
