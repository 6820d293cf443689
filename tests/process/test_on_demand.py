"""A real daemon whose stub servers are loaded by requests and unloaded when none comes."""

import hashlib
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.home import Home, free_ports, is_alive, stub, wait_until

LOAD_S = 1.0
FAILING = ["/bin/sh", "-c", "echo no model; exit 1"]


def write(
    home: Home,
    *services: str,
    load_s: float = LOAD_S,
    gateway: str = "",
    commands: dict[str, list[str]] | None = None,
    **keys: object,
) -> None:
    """A profile of stub servers that start on demand, with one route: chat-7b."""
    text = f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n{gateway}\n'
    for name, port in zip(services, free_ports(len(services)), strict=True):
        command = stub("upstream.py", "--port", port, "--name", name, "--load-s", load_s)
        text += home.command(
            name,
            (commands or {}).get(name, command),
            port=port,
            **{
                "readiness": {"http_get": "/health", "period": "50ms"},
                "grace_period": "2s",
                "start": "on-demand",
                **keys,
            },
        )
    text += f'[route."chat-7b"]\nservices = {json.dumps(services)}\n'
    if "code" in services:
        text += '[route."code-7b"]\nservices = ["code"]\n'
    home.write(text)


def client(home: Home) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{home.gateway_port}",
        timeout=60,
        limits=httpx.Limits(max_connections=None),
    )


def ask(api: httpx.Client, model: str = "chat-7b") -> httpx.Response:
    return api.post("/v1/chat/completions", json={"model": model})


def starts(home: Home, name: str) -> int:
    """How often a process of the service was started."""
    return len(
        [e for e in home.events() if e.get("service") == name and e.get("state") == "starting"]
    )


def test_a_service_on_demand_waits_for_its_first_request(home: Home) -> None:
    write(home, "chat")
    home.start()
    before = home.service("chat")
    assert (before["state"], before["why"]) == ("stopped", "loaded by the first request")
    assert home.cli("status").returncode == 0
    with client(home) as api:
        assert api.get("/health").status_code == 200
        began = time.monotonic()
        answer = ask(api)
        took_s = time.monotonic() - began

    assert answer.status_code == 200
    assert answer.headers["x-llmsup-service"] == "chat"
    assert took_s > LOAD_S
    assert home.service("chat")["state"] == "ready"
    assert [e["service"] for e in home.events() if e["event"] == "loaded"] == ["chat"]


def test_fifty_requests_at_once_are_one_load_and_fifty_answers(home: Home) -> None:
    write(home, "chat")
    home.start()
    with client(home) as api, ThreadPoolExecutor(50) as pool:
        answers = [it.result() for it in [pool.submit(ask, api) for _ in range(50)]]

    assert [it.status_code for it in answers] == [200] * 50
    assert starts(home, "chat") == 1


def test_a_large_body_survives_the_load(home: Home) -> None:
    write(home, "chat")
    home.start()
    body = b'{"model": "chat-7b", "prompt": "' + b"abcdefghij" * 2_000_000 + b'"}'
    with client(home) as api:
        answer = api.post("/v1/completions", content=body)

    assert answer.json()["stub"]["sha256"] == hashlib.sha256(body).hexdigest()


def test_a_load_that_fails_is_told_at_once_and_says_why(home: Home) -> None:
    restart = {"max_deaths": 1}
    write(home, "chat", commands={"chat": FAILING}, restart=restart)
    home.start()
    with client(home) as api:
        answer = ask(api)

    assert answer.status_code == 503
    assert "chat is failed" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_a_fallback_answers_for_one_that_fails_but_not_for_one_that_sleeps(home: Home) -> None:
    write(home, "chat", "code")
    home.start()
    with client(home) as api:
        assert ask(api, "code-7b").headers["x-llmsup-service"] == "code"
        answer = ask(api)
        assert answer.headers["x-llmsup-service"] == "chat"
        assert answer.headers["x-llmsup-fallback"] == "false"


def test_a_fallback_is_loaded_where_the_first_one_fails(home: Home) -> None:
    restart = {"max_deaths": 1}
    write(home, "chat", "code", commands={"chat": FAILING}, restart=restart)
    home.start()
    with client(home) as api:
        answer = ask(api)

    assert answer.status_code == 200
    assert answer.headers["x-llmsup-service"] == "code"
    assert answer.headers["x-llmsup-fallback"] == "true"


def test_requests_wait_for_the_only_server_to_be_restarted(home: Home) -> None:
    write(home, "chat", start="always", load_s=0.3, restart={"backoff": "100ms"})
    home.start()
    with client(home) as api:
        for _ in range(3):
            old = home.wait_state("chat", "ready")
            os.kill(old["pid"], signal.SIGKILL)
            assert ask(api).status_code == 200
            home.wait_replaced(old)


def test_who_waits_longer_than_allowed_is_refused(home: Home) -> None:
    write(home, "chat", load_s=60, gateway='hold_timeout = "300ms"')
    home.start()
    with client(home) as api:
        answer = ask(api)

    assert answer.status_code == 503
    assert "not ready within 300ms" in answer.json()["error"]["message"]


def test_a_stopped_server_is_not_started_by_a_request(home: Home) -> None:
    write(home, "chat", start="always", load_s=0)
    home.start()
    assert home.cli("stop", "chat").returncode == 0
    with client(home) as api:
        answer = ask(api)

    assert answer.status_code == 503
    assert "chat is stopped (stopped on request)" in answer.json()["error"]["message"]


def test_a_client_that_goes_away_while_held_leaves_nothing_behind(home: Home) -> None:
    write(home, "chat")
    home.start()
    with client(home) as api:
        with pytest.raises(httpx.ReadTimeout):
            api.post("/v1/chat/completions", json={"model": "chat-7b"}, timeout=0.3)
        home.wait_state("chat", "ready")
        assert ask(api).status_code == 200
        port = home.service("chat")["port"]
        told = httpx.get(f"http://127.0.0.1:{port}/stub").json()

    assert told["requests"] == {"/v1/chat/completions": 1}


@pytest.mark.parametrize("start", ["on-demand", "always"])
def test_an_idle_server_is_unloaded_and_the_next_request_loads_it_again(
    home: Home, start: str
) -> None:
    write(home, "chat", ttl="500ms", start=start, load_s=0.1)
    home.start()
    with client(home) as api:
        assert ask(api).status_code == 200
        idle = home.wait_state("chat", "stopped")
        assert idle["why"] == "unloaded after 500ms without a request; the next request loads it"
        assert home.cli("status").returncode == 0
        assert api.get("/health").status_code == 200
        assert ask(api).status_code == 200

    assert [e["service"] for e in home.events() if e["event"] == "unloaded"][:1] == ["chat"]


def test_what_is_idle_stays_unloaded_under_a_new_daemon_while_it_has_a_ttl(home: Home) -> None:
    write(home, "chat", ttl="300ms", start="always", load_s=0)
    home.start()
    idle = home.wait_state("chat", "stopped")
    assert home.cli("restart", "--daemon").returncode == 0
    wait_until(lambda: home.service("gateway")["state"] == "ready", "the gateway is adopted")
    assert home.service("chat")["why"] == idle["why"]
    with client(home) as api:
        assert ask(api).status_code == 200
    home.wait_state("chat", "stopped")

    home.profile.write_text(home.profile.read_text().replace('ttl = "300ms"', 'ttl = "0s"'))
    assert home.cli("reload").returncode == 0
    home.wait_state("chat", "ready")


def test_the_list_of_models_tells_which_is_loaded(home: Home) -> None:
    write(home, "chat", ttl="1s", load_s=0.5)
    home.start()

    def status() -> str:
        (model,) = api.get("/v1/models").json()["data"]
        return str(model["status"]["value"])

    with client(home) as api, ThreadPoolExecutor(1) as pool:
        wait_until(lambda: status() == "unloaded", "unloaded")
        asking = pool.submit(ask, api)
        wait_until(lambda: status() == "loading", "loading", pause_s=0.001)
        assert asking.result(60).status_code == 200
        wait_until(lambda: status() == "loaded", "loaded", pause_s=0.001)
        wait_until(lambda: status() == "sleeping", "sleeping")


def test_a_server_is_not_unloaded_while_it_answers(home: Home) -> None:
    write(home, "chat", ttl="300ms", load_s=0)
    home.start()
    with client(home) as api:
        answer = api.post(
            "/v1/chat/completions",
            json={"model": "chat-7b"},
            headers={"x-stub": json.dumps({"delay_ms": 1500})},
        )

    assert answer.status_code == 200
    assert home.service("chat")["generation"] == 1


def test_no_request_fails_while_a_server_is_unloaded_over_and_over(home: Home) -> None:
    """Requests come about when it is unloaded: before, while it drains, and after."""
    write(home, "chat", ttl="200ms", load_s=0)
    home.start()
    with client(home) as api:
        answers = []
        for number in range(25):
            answers.append(ask(api).status_code)
            time.sleep(0.15 + 0.01 * number)

    assert answers == [200] * 25
    assert starts(home, "chat") > 2


def test_a_held_request_outlives_a_reload_of_the_daemon(home: Home) -> None:
    write(home, "chat", load_s=3)
    home.start()
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, api)
        home.wait_state("chat", "starting")
        result = home.cli("restart", "--daemon")
        assert result.returncode == 0, result.stderr

        assert asking.result(60).status_code == 200, home.daemon_log()

    assert home.service("chat")["generation"] == 1


def test_who_becomes_ready_while_a_new_daemon_finds_its_bearings_answers_who_waits(
    home: Home,
) -> None:
    """Given another server that is adopted, and not ready for longer."""
    (port,) = free_ports(1)
    slow = stub("upstream.py", "--port", port, "--name", "code", "--load-s", 8)
    write(home, "chat", load_s=2)
    text = home.profile.read_text()
    slower = home.command(
        "code", slow, port=port, readiness={"http_get": "/health"}, start="on-demand"
    )
    home.write(f'{text}{slower}[route."code-7b"]\nservices = ["code"]\n')
    home.start()
    with client(home) as api, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, api, model) for model in ("code-7b", "chat-7b")]
        home.wait_state("code", "starting")
        home.wait_state("chat", "starting")
        assert home.cli("restart", "--daemon").returncode == 0
        late = pool.submit(ask, api)
        assert [each.result(60).status_code for each in (*asking, late)] == [200] * 3
    assert home.service("chat")["generation"] == 1


def test_a_gateway_killed_while_it_holds_leaves_nothing_that_waits(home: Home) -> None:
    """The clients are cut off by its death; the load goes on, and the next request is answered."""
    write(home, "chat", load_s=2)
    home.start()
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, api)
        home.wait_state("chat", "starting")
        os.kill(home.service("gateway")["pid"], signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            asking.result(60)
        wait_until(lambda: home.service("gateway")["generation"] == 2, "a new Envoy")
        home.wait_state("gateway", "ready")
        assert ask(api).status_code == 200

    assert starts(home, "chat") == 1


def test_a_server_killed_while_it_loads_is_loaded_again_for_who_waits(home: Home) -> None:
    write(home, "chat", restart={"backoff": "100ms"})
    home.start()
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, api)
        wait_until(lambda: home.service("chat")["pid"] is not None, "a process")
        os.kill(home.service("chat")["pid"], signal.SIGKILL)

        assert asking.result(60).status_code == 200

    assert home.service("chat")["generation"] == 2


def test_a_profile_that_turns_a_service_cold_ends_it_and_a_request_loads_it(home: Home) -> None:
    write(home, "chat", start="always", load_s=0)
    home.start()
    old = home.wait_state("chat", "ready")
    text = home.profile.read_text().replace('start = "always"', 'start = "on-demand"')
    home.profile.write_text(text)
    assert home.cli("reload").returncode == 0
    wait_until(lambda: not is_alive(old["pid"]), "the end of the old process")
    with client(home) as api:
        assert ask(api).status_code == 200


def test_a_stop_ends_the_wait_of_those_who_are_held(home: Home) -> None:
    write(home, "chat", load_s=60)
    home.start()
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, api)
        home.wait_state("chat", "starting")
        assert home.cli("stop").returncode == 0
        answer = asking.result(60)

    assert answer.status_code == 503
    assert "the stack is stopping" in answer.json()["error"]["message"]
    assert home.processes() == []


def test_a_killed_daemon_leaves_a_gateway_that_refuses_and_the_next_one_loads(home: Home) -> None:
    write(home, "chat", load_s=0)
    home.start()
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with client(home) as api:
        answer = ask(api)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_unavailable"
        home.start()
        assert ask(api).status_code == 200


def test_models_are_loaded_and_unloaded_with_an_admin_key(home: Home) -> None:
    keys = home.root / "admin-keys.txt"
    keys.write_text("sk-admin\n")
    keys.chmod(0o600)
    write(home, "chat", load_s=0, gateway='admin_keys_file = "admin-keys.txt"')
    home.start()

    def control(verb: str) -> tuple[int, dict[str, Any]]:
        headers = {"authorization": "Bearer sk-admin"}
        answer = api.post(f"/models/{verb}", json={"model": "chat-7b"}, headers=headers)
        return answer.status_code, answer.json()

    with client(home) as api:
        assert control("load") == (200, {"success": True})
        home.wait_state("chat", "ready")
        status, refused = control("load")
        assert (status, refused["error"]["message"]) == (400, "model is already running")
        assert control("unload") == (200, {"success": True})
        home.wait_state("chat", "stopped")
        assert control("unload")[0] == 400
        (model,) = api.get("/v1/models").json()["data"]
        assert model["status"] == {"value": "unloaded"}
        assert ask(api).status_code == 200, "a request loads it again"


def test_only_this_user_can_reach_the_activator(home: Home) -> None:
    write(home, "chat")
    home.start()
    path = home.paths.gateway / "activator.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404")
