"""Real models are switched behind the real Envoy, under a closed loop of clients."""

import asyncio
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from bench.models import gemma, smollm2
from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.drill.traffic import Load, Record, chat_body
from tests.e2e.conftest import real_stack
from tests.home import Home

SWITCHES = 6


def under_load(home: Home, act: Callable[[], object]) -> list[Record]:
    async def run() -> list[Record]:
        load = Load(home.gateway_port, chat_body("chat-3b", max_tokens=2), clients=8, pause_s=0.02)
        load.start()
        try:
            await asyncio.to_thread(act)
            answered = len(load.records)
            while len(load.records) < answered + 8:
                await asyncio.sleep(0.02)
        finally:
            await load.finish()
        return load.records

    return asyncio.run(run())


def test_switches_back_and_forth_lose_no_request(home: Home) -> None:
    real_stack(home)
    home.start(timeout_s=90)
    seen: list[SwitchProgress] = []
    results: list[SwitchResult] = []
    models: list[Path] = list(islice(cycle((gemma(), smollm2())), SWITCHES))

    def act() -> None:
        client = Client(home.paths)
        for model in models:
            results.append(client.switch("chat", str(model), seen.append))
            asked = {each["service"]: each["model"] for each in client.models()}
            assert asked == {"chat": model.name, "code": gemma().name}

    records = under_load(home, act)

    assert [record.error for record in records if record.failed] == []
    assert {record.service for record in records} == {"chat", "code"}
    assert all(record.is_fallback == (record.service == "code") for record in records)
    assert [each["current_model"] for each in results] == [model.name for model in models]
    assert all(each["success"] for each in results)
    loading = [each for each in seen if each["phase"] == "loading"]
    assert loading[-1]["last_load_s"], "it was loaded before"
    assert 0 < loading[-1]["size_bytes"] == smollm2().stat().st_size
    print("switches", *(f"{each['switch_time_s']:.2f} s" for each in results))


def test_single_mode_has_one_model_after_the_other(home: Home) -> None:
    """Whoever asks meanwhile waits, and is answered by the one that comes."""
    real_stack(home)
    text = home.profile.read_text()
    home.profile.write_text('mode = "single"\nactive = "chat"\n' + text)
    home.start(timeout_s=90)
    results: list[SwitchResult] = []

    def act() -> None:
        results.extend(Client(home.paths).switch(name) for name in ("code", "chat", "code"))

    records = under_load(home, act)

    assert [each["message"] for each in results] == [
        f"code serves {gemma().name} now",
        f"chat serves {smollm2().name} now",
        f"code serves {gemma().name} now",
    ]
    assert [record.error for record in records if record.failed] == []
    assert all(record.is_fallback == (record.service == "code") for record in records)


def test_what_is_no_model_leaves_the_real_one_serving(home: Home) -> None:
    """Given a file that is cut off, and one whose tensors no engine knows what to do with."""
    real_stack(home)
    home.start(timeout_s=90)
    short = home.root / "short.gguf"
    short.write_bytes(smollm2().read_bytes()[: 20 * 2**20])
    odd = home.root / "odd.gguf"
    odd.write_bytes(smollm2().read_bytes().replace(b"blk.7.attn_q.weight", b"blk.7.attn_z.weight"))
    client = Client(home.paths)

    refused = client.switch("chat", str(short))
    assert refused["message"].endswith(f"chat ({smollm2().name}) serves as before")
    restored = client.switch("chat", str(odd))

    assert restored["message"].endswith(f"chat ({smollm2().name}) serves again"), restored
    assert restored["current_model"] == smollm2().name
    assert client.switch("chat", str(gemma()))["success"]
