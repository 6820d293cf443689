"""A real llama-server that hangs is replaced; one that is busy for long is not."""

import asyncio
import os
import signal
import time

import pytest

from llmsup.drill.traffic import Client, Load, chat_body
from tests.e2e.conftest import real_stack
from tests.home import Home, wait_until

BOUND_S = 3.0
SLOTS = 4


@pytest.fixture
def watched(home: Home) -> Home:
    """The real stack, up, each server watched closely."""
    real_stack(home)
    plain = home.profile.read_text()
    home.profile.write_text(
        plain.replace("parallel =", f'liveness = {{ timeout = "{BOUND_S:g}s" }}\nparallel =')
    )
    home.start(timeout_s=90)
    return home


def test_a_stopped_server_under_load_is_replaced_and_fails_no_request(watched: Home) -> None:
    async def run() -> Load:
        load = Load(watched.gateway_port, chat_body("chat-3b", max_tokens=8), clients=4)
        load.start()
        while len(load.records) < 8:
            await asyncio.sleep(0.02)
        chat = await asyncio.to_thread(watched.service, "chat")
        os.kill(chat["pid"], signal.SIGSTOP)
        await asyncio.to_thread(watched.wait_replaced, chat, 60)
        await load.finish()
        return load

    load = asyncio.run(run())
    assert [record.error for record in load.records if record.failed] == []
    whys = [event["why"] for event in watched.events() if event.get("state") == "stopping"]
    assert len(whys) == 1
    assert whys[0].startswith("stopped by a signal, has not moved for ")


def test_a_server_with_long_prompts_in_all_slots_is_left_alone(watched: Home) -> None:
    """Given every slot busy, and as many requests waiting, for several times the bound."""
    text = "The quick brown fox jumps over the lazy dog. " * 80

    async def run() -> tuple[Load, float]:
        body = chat_body("chat-3b", max_tokens=64, text=text)
        load = Load(watched.gateway_port, body, clients=2 * SLOTS)
        begun = time.monotonic()
        load.start()
        await asyncio.sleep(4 * BOUND_S)
        await load.finish()
        return load, time.monotonic() - begun

    load, busy_s = asyncio.run(run())
    assert busy_s > 4 * BOUND_S
    assert [record.error for record in load.records if record.failed] == []
    assert {record.service for record in load.records} == {"chat"}
    assert watched.service("chat")["generation"] == 1
    wait_until(lambda: watched.service("chat")["state"] == "ready", "chat, ready again")


def test_one_long_batch_of_a_real_server_is_no_hang(home: Home) -> None:
    """Given a prompt that is computed in one batch, during which no counter moves."""
    real_stack(home)
    plain = home.profile.read_text()
    home.profile.write_text(
        plain.replace(
            "parallel = 4",
            'parallel = 1\nbatch = 4096\nubatch = 4096\nliveness = { timeout = "2s" }',
        )
    )
    home.start(timeout_s=90)
    text = "The quick brown fox jumps over the lazy dog. " * 250

    async def ask() -> tuple[int, str, float]:
        api = Client("127.0.0.1", home.gateway_port)
        record = await api.ask(chat_body("chat-3b", max_tokens=1, text=text))
        await api.close()
        return record.status, record.service, record.wait_s

    status, service, wait_s = asyncio.run(ask())
    assert (status, service) == (200, "chat")
    assert wait_s > 2.0, "shorter than the bound: no proof"
    assert home.service("chat")["generation"] == 1
