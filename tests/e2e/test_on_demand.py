"""A real model that the first request loads: what it costs beyond the load."""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from bench.models import smollm2
from llmsup.host.admin import Admin
from llmsup.services.envoy import Layout
from tests.home import Home, free_ports, wait_until

EXTRA_S = 0.15
LEAVING = 20
PROMPT_TOKENS = "llamacpp:prompt_tokens_total "


@pytest.fixture
def cold(home: Home) -> Home:
    """SmolLM2 on the CPU, on demand."""
    model = smollm2()
    (port,) = free_ports(1)
    home.write(
        f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n'
        f'[models]\ndirs = ["{model.parent}"]\n'
        f'[service.chat]\nkind = "llama-server"\nmodel = "{model.name}"\nport = {port}\n'
        'gpu_layers = 0\nctx_size = 4096\nparallel = 4\nargs = ["--threads", "1"]\n'
        'start = "on-demand"\n'
    )
    home.start()
    return home


def client(home: Home) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{home.gateway_port}",
        timeout=90,
        limits=httpx.Limits(max_connections=None),
    )


def ask(api: httpx.Client, **keys: object) -> httpx.Response:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 1,
        "cache_prompt": False,
        **keys,
    }
    return api.post("/v1/chat/completions", json=body)


def load_s(home: Home) -> float:
    """From the spawn of the newest generation to its readiness, as the journal has it."""
    at = {e["state"]: e["time"] for e in home.events() if e.get("service") == "chat"
          and e["event"] == "state"}  # fmt: skip
    return float(at["ready"] - at["starting"])


def test_a_cold_request_takes_the_load_and_little_more(cold: Home) -> None:
    extras = []
    with client(cold) as api:
        for _ in range(5):
            began = time.monotonic()
            assert ask(api).status_code == 200
            cold_s = time.monotonic() - began
            loaded_s = load_s(cold)
            warm = []
            for _ in range(3):
                began = time.monotonic()
                assert ask(api).status_code == 200
                warm.append(time.monotonic() - began)
            extras.append(cold_s - loaded_s - sorted(warm)[1])
            print(f"cold {cold_s:.3f} s, load {loaded_s:.3f} s, warm {sorted(warm)[1]:.3f} s")
            assert cold.cli("stop", "chat").returncode == 0
            cold.wait_state("chat", "stopped")
    print("beyond the load:", ", ".join(f"{extra * 1000:.0f} ms" for extra in extras))
    assert min(extras) < EXTRA_S


def test_fifty_cold_requests_are_one_load_and_fifty_answers(cold: Home) -> None:
    with client(cold) as api, ThreadPoolExecutor(50) as pool:
        answers = [it.result() for it in [pool.submit(ask, api) for _ in range(50)]]

    assert [it.status_code for it in answers] == [200] * 50
    assert cold.service("chat")["generation"] == 1


def test_a_cold_stream_arrives_event_by_event(cold: Home) -> None:
    with (
        client(cold) as api,
        api.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": "chat",
                "messages": [{"role": "user", "content": "Count from one to twenty."}],
                "max_tokens": 30,
                "ignore_eos": True,
                "stream": True,
            },
        ) as answer,
    ):
        lines = [(line, time.monotonic()) for line in answer.iter_lines()]

    arrivals = [at for line, at in lines if line.startswith("data: {")]
    assert answer.status_code == 200
    assert len(arrivals) >= 10
    assert arrivals[-1] - arrivals[0] > 0.02, "not all at once"


def test_a_body_of_20_mb_comes_to_the_cold_server_whole(cold: Home) -> None:
    """Its tokens are too many for the context, and the server says so: it has read them all."""
    content = "hello " * 40_000
    padding = "x" * 20_000_000
    with client(cold) as api:
        answer = api.post(
            "/v1/completions", json={"model": "chat", "prompt": content, "pad": padding}
        )

    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "exceed_context_size_error"
    assert answer.headers["x-llmsup-service"] == "chat"


def test_clients_that_go_away_while_held_leave_nothing_behind(cold: Home) -> None:
    """Some of them in the middle of a large body. The server never hears of any."""
    open_files = []
    for generation in (1, 2):
        with ThreadPoolExecutor(LEAVING) as pool:
            list(pool.map(partial(leave, cold), range(LEAVING)))
        chat = cold.wait_state("chat", "ready")
        assert chat["generation"] == generation, "one load for all of them"
        settled(cold)
        assert prompt_tokens(chat["port"]) == 0
        open_files.append({name: files_of(pid) for name, pid in pids(cold).items()})
        assert cold.cli("stop", "chat").returncode == 0
        cold.wait_state("chat", "stopped")

    first, second = open_files
    # Not one for each client; that between the gateway and the daemon may be kept for the next.
    assert all(second[name] < count + LEAVING / 4 for name, count in first.items()), open_files
    with client(cold) as api:
        assert ask(api).status_code == 200
    assert prompt_tokens(cold.service("chat")["port"]) > 0


def prompt_tokens(port: int) -> int:
    """How many the server has read since it started."""
    told = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return int(next(x for x in told.splitlines() if x.startswith(PROMPT_TOKENS)).split()[1])


def leave(home: Home, number: int) -> None:
    """Ask for the cold model, and hang up before it can have answered."""
    body = b'{"model": "chat", "prompt": "hello", "pad": "' + b"x" * 2_000_000 + b'"}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    is_whole = number % 2 == 0
    with socket.create_connection(("127.0.0.1", home.gateway_port)) as connection:
        connection.sendall(head.encode() + (body if is_whole else body[: len(body) // 2]))
        time.sleep(0.1)


def settled(home: Home) -> None:
    """Until the gateway has no request of anybody any more."""
    socket_path = Layout(home.paths.gateway).admin_socket
    assert socket_path.exists()
    admin = Admin(socket_path)
    wait_until(lambda: asyncio.run(admin.requests_active()) == 0, "no request is left")


def pids(home: Home) -> dict[str, int]:
    return {
        "daemon": home.status()["daemon"]["pid"],
        "gateway": home.service("gateway")["pid"],
    }


def files_of(pid: int) -> int:
    """The fewest of a few looks: probes come and go."""
    counts = []
    for _ in range(20):
        counts.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        time.sleep(0.03)
    return min(counts)
