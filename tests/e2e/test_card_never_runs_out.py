"""Real models on a card that is too small for them, and that other programs use, too.

The card is the stand-in: real llama-servers really offload to it, run out of it and answer.
"""

import asyncio
import json
import os
from functools import partial
from pathlib import Path
from random import Random

import pytest

from bench.models import gemma, smollm2
from llmsup.drill.traffic import Client, Load, Record, chat_body
from tests.home import Home, free_ports, wait_until
from tests.standin import StandIn

MIB = 2**20
TOTAL_MIB = 640
OVERHEAD_MIB = 24
HEADROOM_MIB = 40
TAKES_MIB = 500 * TOTAL_MIB // 6141
"""What 500 MiB are on a card of 6 GB."""

OTHERS_MIB = 160
"""What other programs have anyway."""

LONG = "Tell me a story about a dog and a cat who went to sea in a boat. " * 20

CAPS = int(os.environ.get("LLMSUP_CARD_CAPS", "6"))
"""`make card` tries thirty."""

SERVICES = ("chat", "code")
ROUTES = ("chat-3b", "code-7b")


def profile(home: Home, rebalance: str) -> None:
    """SmolLM2 as chat before Gemma as code, each the other's fallback."""
    chat, code = free_ports(2)
    text = f"""
[models]
dirs = ["{smollm2().parent}", "{gemma().parent}"]
[gpu]
ceiling = "100%"
headroom = "{HEADROOM_MIB}MiB"
rebalance = "{rebalance}"
"""
    for name, port, model, priority in (
        ("chat", chat, smollm2().name, 10),
        ("code", code, gemma().name, 5),
    ):
        text += f"""
[service.{name}]
kind = "llama-server"
model = "{model}"
port = {port}
priority = {priority}
ctx_size = 2048
parallel = 2
args = ["--threads", "1"]
grace_period = "5s"
readiness = {{ http_get = "/health", period = "200ms" }}
restart = {{ backoff = "100ms", max_deaths = 20 }}
"""
    text += '[route."chat-3b"]\nservices = ["chat", "code"]\n'
    text += '[route."code-7b"]\nservices = ["code", "chat"]\n'
    home.write(text)


@pytest.fixture
def card(card_library: Path, tmp_path: Path) -> StandIn:
    return StandIn(
        tmp_path, card_library, total_mib=TOTAL_MIB, reserved_mib=0, overhead_mib=OVERHEAD_MIB
    )


@pytest.fixture
def on_card(home: Home, card: StandIn) -> Home:
    home.environ |= card.environ
    return home


def answers(home: Home) -> list[Record]:
    """One from each route."""

    return [ask(home, chat_body(route, max_tokens=4)) for route in ROUTES]


def deaths(home: Home, since: int = 0) -> list[dict[str, object]]:
    return [event for event in home.events()[since:] if event["event"] == "death"]


def layers(home: Home) -> dict[str, int]:
    return {name: int(home.service(name)["gpu_layers"]) for name in SERVICES}


@pytest.mark.timeout(120 + 20 * CAPS)
def test_every_start_is_ready_and_answers_whatever_is_free(
    on_card: Home, card: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given caps from "nothing fits" to "all fits", in any order, under one daemon."""
    profile(on_card, "off")
    card.take(OTHERS_MIB)
    on_card.start(timeout_s=120)
    before_first_load = deaths(on_card)
    assert len(before_first_load) <= len(SERVICES), "one retry each"

    caps = [round(20 + each * (TOTAL_MIB - 40) / (CAPS - 1)) for each in range(CAPS)]
    Random(CAPS).shuffle(caps)
    rows: list[tuple[int, str, int, float, float, float]] = []
    for cap_mib in caps:
        seen = len(on_card.events())
        assert on_card.cli("stop", *SERVICES).returncode == 0
        wait_until(partial(is_seen, on_card, card), "what was theirs is back", pause_s=0.1)
        card.give_back()
        card.take(TOTAL_MIB - cap_mib)
        started = on_card.cli("start", timeout_s=120)
        assert started.returncode == 0, f"{cap_mib} MiB: {started.stderr}{on_card.daemon_log()}"

        assert [(record.status, record.error) for record in answers(on_card)] == [(200, "")] * 2
        assert deaths(on_card, seen) == [], f"{cap_mib} MiB"
        for name in SERVICES:
            info = on_card.service(name)
            assert info["state"] == "ready"
            used = card.used_by(info["pid"])
            planned, measured = info["planned_bytes"] or 0, info["measured_bytes"] or 0
            row = (cap_mib, name, info["gpu_layers"], planned / MIB, measured / MIB, used)
            rows.append(row)
        assert card.free_mib >= 0
    with capsys.disabled():
        show(rows)
    by_cap = {cap: {row[1]: row[2] for row in rows if row[0] == cap} for cap in caps}
    assert by_cap[min(caps)] == {"chat": 0, "code": 0}
    assert by_cap[max(caps)] == {"chat": 31, "code": 19}
    assert len({str(each) for each in by_cap.values()}) > 2, "something in between"
    for _, _, number, planned_mib, _, used_mib in rows:
        assert used_mib <= planned_mib + HEADROOM_MIB
        assert (number == 0) == (used_mib == 0)


def is_seen(home: Home, card: StandIn) -> bool:
    """Whether the daemon knows what is free."""
    return bool(home.status()["gpu"]["free_bytes"] == round(card.free_mib * MIB))


def show(rows: list[tuple[int, str, int, float, float, float]]) -> None:
    """The plan beside what the card really lost, in MiB."""
    print("\n cap  service  layers   planned  measured      used     error")
    for cap, name, number, planned, measured, used in sorted(rows):
        figures = "".join(f"{each:10.1f}" for each in (planned, measured, used, planned - used))
        print(f"{cap:4}  {name:7}  {number:6}{figures}")


@pytest.mark.timeout(300)
def test_a_program_that_takes_memory_at_any_moment_fails_no_request(
    on_card: Home, card: StandIn
) -> None:
    """Given one that takes it while a server loads, after that and while all of them serve."""
    profile(on_card, "auto")
    card.take(OTHERS_MIB)
    on_card.start(timeout_s=120)
    has_answered(on_card, *SERVICES)
    chance = Random(4)

    async def run() -> Load:
        load = loaded(on_card)
        for name in ("code", "chat", "code"):
            restart = asyncio.create_task(asyncio.to_thread(on_card.cli, "restart", name))
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            card.take(TAKES_MIB)
            assert (await restart).returncode == 0
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            only_takes(card, OTHERS_MIB)
            await asyncio.to_thread(settled, on_card)
            await asyncio.to_thread(has_answered, on_card, name)
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            card.take(TAKES_MIB)
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            only_takes(card, OTHERS_MIB)
        await asyncio.to_thread(settled, on_card)
        await load.finish()
        return load

    load = asyncio.run(run())
    assert failures(load) == []
    assert len(load.records) > 20


@pytest.mark.timeout(400)
def test_the_last_in_rank_shrinks_and_grows_back_and_no_request_fails(
    on_card: Home, card: StandIn
) -> None:
    profile(on_card, "auto")
    card.take(OTHERS_MIB)
    on_card.start(timeout_s=120)
    has_answered(on_card, *SERVICES)
    before = layers(on_card)
    assert 0 < before["code"] < 19, "some of it fits"

    def squeeze_and_relieve() -> None:
        card.take(int(card.free_mib) - 5)
        wait_until(lambda: len(changes(on_card)) == 1, "a service that shrank", deadline_s=90)
        settled(on_card)
        ((name, was, became),) = changes(on_card)
        assert (name, was) == ("code", before["code"]), "the lower priority"
        assert became < was
        assert layers(on_card) == {"chat": before["chat"], "code": became}
        assert "other programs left" in on_card.service("code")["why"]
        assert "other programs left" in on_card.cli("why", "code").stdout

        only_takes(card, OTHERS_MIB)
        wait_until(lambda: len(changes(on_card)) == 2, "that it grew again", deadline_s=180)
        settled(on_card)
        assert layers(on_card) == before

    async def run() -> Load:
        load = loaded(on_card)
        await asyncio.to_thread(squeeze_and_relieve)
        await load.finish()
        return load

    load = asyncio.run(run())
    assert failures(load) == []
    assert deaths(on_card) == []


@pytest.mark.timeout(300)
def test_a_server_that_runs_out_at_run_time_comes_back_smaller(
    on_card: Home, card: StandIn
) -> None:
    """Given a card that is full by the time of the first long prompt, which needs more."""
    profile(on_card, "off")
    on_card.start(timeout_s=120)
    chat = on_card.service("chat")
    assert chat["gpu_layers"] == 31
    card.take(int(card.free_mib))

    record = ask(on_card, chat_body("chat-3b", max_tokens=4, text=LONG))
    assert (record.status, record.service) == (200, "code")
    again = on_card.wait_replaced(chat, deadline_s=120)
    assert again["gpu_layers"] < 31
    (death,) = deaths(on_card)
    assert (death["service"], death["cause"]) == ("chat", "out of GPU memory")
    why = on_card.cli("why", "chat").stdout
    assert "out of GPU memory" in why
    assert f"31 → {again['gpu_layers']} layers" in json.dumps(on_card.events(), ensure_ascii=False)
    record = ask(on_card, chat_body("chat-3b", max_tokens=4, text=LONG))
    assert (record.status, record.service) == (200, "chat")


def ask(home: Home, body: bytes) -> Record:
    async def run() -> Record:
        api = Client("127.0.0.1", home.gateway_port)
        record = await api.ask(body)
        await api.close()
        return record

    return asyncio.run(run())


def has_answered(home: Home, *services: str) -> None:
    """Each has computed a prompt, for which a server takes memory beyond what it loads with."""
    for name in services:
        record = ask(home, chat_body(name, max_tokens=1, text=LONG))
        assert (record.status, record.service) == (200, name), record.error


def loaded(home: Home) -> Load:
    """Clients in a closed loop."""
    body = chat_body("code-7b", max_tokens=8)
    load = Load(home.gateway_port, body, clients=3, pause_s=0.1)
    load.start()
    return load


def failures(load: Load) -> list[str]:
    """What went wrong, and when."""
    return [f"{r.sent_at:.1f}: {r.status} {r.error}" for r in load.records if r.failed]


def only_takes(card: StandIn, mib: int) -> None:
    """Other programs have so much, and no more."""
    card.give_back()
    card.take(mib)


def settled(home: Home) -> None:
    for name in SERVICES:
        home.wait_state(name, "ready", deadline_s=90)


def changes(home: Home) -> list[tuple[str, int, int]]:
    """Who changed size, from how many layers to how many."""
    return [
        (event["service"], event["layers_before"], event["layers_after"])
        for event in home.events()
        if event["event"] == "rebalance" and "layers_after" in event
    ]
