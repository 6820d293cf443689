"""Real llama-servers with real models behind the real Envoy."""

import asyncio
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from bench.models import smollm2
from llmsup.drill.traffic import Client, Load, chat_body
from tests.e2e.conftest import real_stack
from tests.home import Home, wait_until


def client(stack: Home) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{stack.gateway_port}/v1", api_key="none", max_retries=0,
        timeout=60,
    )  # fmt: skip


def settled(stack: Home) -> None:
    """Both models ready and in their places, whatever the last test did."""
    for name in ("chat", "code"):
        stack.wait_state(name, "ready", deadline_s=60)
    wait_until(
        lambda: all(
            row["confirmed"] == row["desired"]
            for row in json.loads(stack.cli("upstreams", "--json").stdout)
        ),
        "Envoy has the lists",
    )


def test_the_official_client_gets_answers_from_both_models(stack: Home) -> None:
    settled(stack)
    with client(stack) as api:
        for model, service in (("chat-3b", "chat"), ("code-7b", "code"), ("code", "code")):
            raw = api.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=16,
            )
            assert raw.headers["x-llmsup-service"] == service
            assert raw.headers["x-llmsup-fallback"] == "false"
            answer = raw.parse().choices[0].message.content
            assert answer
        assert {model.id for model in api.models.list()} >= {"chat-3b", "gpt-4o-mini", "code-7b"}
        with pytest.raises(openai.NotFoundError) as error:
            api.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hi"}])
        assert "chat-3b" in str(error.value)


def test_a_stream_arrives_token_by_token(stack: Home) -> None:
    """In one of three tries: whoever reads may be kept from it until all is there."""
    settled(stack)
    spans_s = []
    for _ in range(3):
        with (
            client(stack) as api,
            api.chat.completions.create(
                model="chat-3b",
                messages=[{"role": "user", "content": "Count from one to twenty."}],
                max_tokens=40,
                stream=True,
                extra_body={"ignore_eos": True},
            ) as stream,
        ):
            arrivals = [
                time.monotonic()
                for chunk in stream
                if chunk.choices and chunk.choices[0].delta.content
            ]
        assert len(arrivals) >= 10
        spans_s.append(arrivals[-1] - arrivals[0])
    assert max(spans_s) > 0.02, "not all at once"


def test_no_request_fails_while_chat_is_killed_under_load(stack: Home) -> None:
    settled(stack)

    async def run() -> Load:
        load = Load(stack.gateway_port, chat_body("chat-3b", max_tokens=8), clients=6)
        load.start()
        chat = stack.service("chat")
        for _ in range(3):
            answered = len(load.records)
            while len(load.records) < answered + 6:
                await asyncio.sleep(0.02)
            os.kill(chat["pid"], signal.SIGKILL)
            chat = await asyncio.to_thread(stack.wait_replaced, chat, 60)
        await load.finish()
        return load

    load = asyncio.run(run())
    assert [record.error for record in load.records if record.failed] == []
    assert {record.service for record in load.records} == {"chat", "code"}
    assert all(record.is_fallback == (record.service == "code") for record in load.records)


def test_a_long_answer_in_flight_is_answered_by_the_other_model(stack: Home) -> None:
    settled(stack)

    async def run() -> tuple[str, int]:
        api = Client("127.0.0.1", stack.gateway_port)
        body = chat_body("chat-3b", max_tokens=200, text="Tell a long story about a ship.")
        asking = asyncio.create_task(api.ask(body))
        chat = await asyncio.to_thread(stack.service, "chat")
        while not await asyncio.to_thread(_is_busy, chat["port"]):
            await asyncio.sleep(0.02)
        os.kill(chat["pid"], signal.SIGKILL)
        record = await asking
        await api.close()
        return record.service, record.status

    assert asyncio.run(run()) == ("code", 200)


def test_a_stream_killed_over_its_prompt_is_answered_by_the_other_model(stack: Home) -> None:
    """llama-server has sent its headers by then; the client must not have seen them."""
    settled(stack)
    chat = stack.service("chat")
    prompt = " ".join(f"The ship number {number} sails away." for number in range(80))
    with client(stack) as api, ThreadPoolExecutor(1) as pool:

        def ask() -> tuple[str | None, str | None, str]:
            raw = api.chat.completions.with_raw_response.create(
                model="chat-3b",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=8,
                stream=True,
            )
            told = [raw.headers.get(f"x-llmsup-{name}") for name in ("service", "fallback")]
            choices = [each.choices[0] for each in raw.parse() if each.choices]
            return told[0], told[1], str(choices[-1].finish_reason)

        asking = pool.submit(ask)
        wait_until(lambda: _is_busy(chat["port"]), "chat reads the prompt", pause_s=0.005)
        os.kill(chat["pid"], signal.SIGKILL)

        assert asking.result(60) == ("code", "true", "length")


def _is_busy(port: int) -> bool:
    import urllib.request  # noqa: PLC0415 - only here

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/slots", timeout=5) as response:
        return any(slot["is_processing"] for slot in json.load(response))


def test_a_restart_under_load_fails_no_request(stack: Home) -> None:
    """Given both services restarted in turn, requests in flight finish before each goes down."""
    settled(stack)

    async def run() -> Load:
        load = Load(stack.gateway_port, chat_body("chat-3b", max_tokens=8), clients=4)
        load.start()
        result = await asyncio.to_thread(stack.cli, "restart")
        assert result.returncode == 0, result.stderr
        await load.finish()
        return load

    load = asyncio.run(run())
    assert [record.error for record in load.records if record.failed] == []
    restarted = [e for e in stack.events() if e.get("service") == "chat" and e["event"] == "state"]
    assert [e["state"] for e in restarted[-4:]] == ["draining", "stopping", "starting", "ready"]


def test_the_servers_own_output_is_in_the_logs(stack: Home) -> None:
    settled(stack)
    result = stack.cli("logs", "chat", "-n", "5000")
    assert result.returncode == 0
    assert "listening" in result.stdout
    assert "\x1b" not in result.stdout


def test_ten_concurrent_requests_are_all_answered(stack: Home) -> None:
    settled(stack)

    async def ask() -> int:
        api = Client("127.0.0.1", stack.gateway_port)
        record = await api.ask(chat_body("chat-3b", max_tokens=12))
        await api.close()
        return record.status

    async def run() -> list[int]:
        return list(await asyncio.gather(*(ask() for _ in range(10))))

    assert asyncio.run(run()) == [200] * 10


def test_a_truncated_model_fails_before_a_server_is_spawned(home: Home) -> None:
    """Given half a model as chat, code still answers chat's route and status says why."""
    half = home.root / "half.gguf"
    whole = smollm2().read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    real_stack(home, chat_model=str(half))
    home.start("--no-wait")
    failed = home.wait_state("chat", "failed", deadline_s=60)
    assert failed["why"].startswith(
        "model file truncated: half.gguf: the header says 96.6 MB of tensors, "
        "the file has 47.4 MB (download it again)"
    )
    assert failed["generation"] == 1, "what would fail again the same way is not tried again"
    assert failed["pid"] is None
    assert not home.paths.service_log("chat").exists(), "nothing was spawned"
    home.wait_state("code", "ready", deadline_s=60)

    async def ask() -> tuple[int, str, bool]:
        api = Client("127.0.0.1", home.gateway_port)
        record = await api.ask(chat_body("chat-3b"))
        await api.close()
        return record.status, record.service, record.is_fallback

    assert asyncio.run(ask()) == (200, "code", True)
    assert home.cli("status").returncode == 1
    assert home.cli("stop").returncode == 0
    assert home.processes() == []


def test_the_demo_runs_as_a_newcomer_sees_it(home: Home) -> None:
    """`make demo` without the installation: it measures, says how to go on, leaves the stack up."""
    import subprocess  # noqa: PLC0415 - only here
    import sys  # noqa: PLC0415

    from tests.home import free_ports  # noqa: PLC0415

    chat, code = free_ports(2)
    result = subprocess.run(
        [
            sys.executable, "-m", "bench.demo",
            "--set", f"gateway.listen=127.0.0.1:{home.gateway_port}",
            "--set", f"service.chat.port={chat}", "--set", f"service.code.port={code}",
        ],
        env=home.environ, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for said in ("kill -9", "failed", "longest wait", "chat back and ready after", "curl", "stop"):
        assert said in result.stdout
    assert home.cli("status").returncode == 0
    assert home.cli("stop").returncode == 0
    assert home.processes() == []
