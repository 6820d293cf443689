"""A whole stack on the card without a GPU: planned, loaded, measured, run full, and answering."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.models import gemma, smollm2
from tests.e2e.small_card import wait_measured
from tests.home import Home, free_ports, wait_until
from tests.standin import StandIn

SMOLLM2_LAYERS = 31
LOAD_TIMEOUT_S = 110.0


def stack(home: Home, card: StandIn, *names: str, **keys: str) -> None:
    """Services that leave their layers to the plan: SmolLM2 as chat and Gemma as code."""
    models = {"chat": smollm2(), "code": gemma()}
    text = f'[models]\ndirs = ["{smollm2().parent}", "{gemma().parent}"]\n'
    text += '[gpu]\nceiling = "100%"\nheadroom = "64MiB"\n'
    for name, port in zip(names, free_ports(len(names)), strict=True):
        lines = {
            "kind": '"llama-server"',
            "model": f'"{models[name].name}"',
            "port": str(port),
            "ctx_size": "2048",
            "priority": "10" if name == "chat" else "0",
            "args": '["--threads", "1"]',
            "readiness": '{ period = "500ms" }',
            "restart": '{ backoff = "100ms" }',
            **keys,
        }
        text += f"[service.{name}]\n" + "".join(f"{k} = {v}\n" for k, v in lines.items())
        others = ", ".join(f'"{each}"' for each in sorted(names, key=lambda each: each != name))
        text += f'[route."{name}-model"]\nservices = [{others}]\n'
    home.write(text)
    home.environ |= card.environ


def answers(home: Home, name: str, prompt: str = "Hi.") -> str:
    """Which service answered on the route of this one."""
    url = f"http://127.0.0.1:{home.gateway_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as api:
        raw = api.chat.completions.with_raw_response.create(
            model=f"{name}-model", messages=[{"role": "user", "content": prompt}], max_tokens=4
        )
        assert raw.parse().choices
        return raw.headers["x-llmsup-service"]


def told(home: Home, event: str, name: str) -> list[dict[str, Any]]:
    return [e for e in home.events() if e["event"] == event and e.get("service") == name]


def test_the_plan_is_what_the_servers_take_and_they_answer(home: Home, card: StandIn) -> None:
    stack(home, card, "chat", "code")
    home.start(timeout_s=LOAD_TIMEOUT_S)

    taken = 0.0
    for name in ("chat", "code"):
        wait_measured(home, name)
        service = home.service(name)
        assert service["gpu_layers"] == told(home, "plan", name)[0]["gpu_layers"] > 0
        mib = card.used_by(service["pid"])
        assert abs(service["measured_bytes"] / 2**20 - mib) < 8
        taken += mib
    assert card.free_mib + taken == pytest.approx(5900, abs=1)
    for name in ("chat", "code"):
        assert answers(home, name) == name
    assert home.service("chat")["gpu_layers"] == SMOLLM2_LAYERS
    assert told(home, "death", "chat") == told(home, "death", "code") == []


def test_what_a_load_took_is_what_the_next_plan_counts_with(home: Home, card: StandIn) -> None:
    stack(home, card, "chat")
    home.start(timeout_s=LOAD_TIMEOUT_S)
    wait_until(lambda: len(told(home, "measured", "chat")) == 1, "a measurement")
    before = home.service("chat")
    assert home.cli("restart", "chat").returncode == 0
    after = home.wait_replaced(before, deadline_s=60)

    first, second = (each["planned_mib"] for each in told(home, "plan", "chat"))
    took = told(home, "measured", "chat")[0]["measured_mib"]
    assert first > took + 8
    assert second == pytest.approx(took, abs=1)
    assert after["gpu_layers"] == SMOLLM2_LAYERS


def test_a_small_card_is_filled_by_rank_and_nobody_runs_out(home: Home, card: StandIn) -> None:
    card.take(5900 - 420)
    stack(home, card, "chat", "code")
    home.start(timeout_s=LOAD_TIMEOUT_S)

    chat, code = home.service("chat"), home.service("code")
    assert 0 < chat["gpu_layers"] <= SMOLLM2_LAYERS
    assert answers(home, "chat") == "chat"
    assert answers(home, "code") == "code"
    assert len(told(home, "death", "chat")) <= 1
    assert card.free_mib >= 0
    assert chat["gpu_layers"] == SMOLLM2_LAYERS or code["gpu_layers"] == 0


@pytest.mark.timeout(500)
def test_whatever_the_card_has_left_both_come_up_and_nobody_runs_out(
    home: Home, card: StandIn
) -> None:
    """Given caps from "nothing fits" to "all fits", under each of which both models answer."""
    stack(home, card, "chat", "code")
    given = []
    for cap_mib in (100, 200, 280, 360, 450, 600, 900):
        card.give_back()
        card.take(5900 - cap_mib)
        home.start(timeout_s=LOAD_TIMEOUT_S)
        services = [home.service(name) for name in ("chat", "code")]
        given.append([each["gpu_layers"] for each in services])
        assert card.free_mib >= 0
        for name in ("chat", "code"):
            assert answers(home, name) == name
        assert home.cli("stop", "--now").returncode == 0

    chat = [layers for layers, _ in given]
    assert chat == sorted(chat), given
    assert given[0] == [0, 0]
    assert chat[-1] == SMOLLM2_LAYERS
    assert given[-1][1] > 0
    assert len(told(home, "death", "chat")) + len(told(home, "death", "code")) <= 1


def test_a_driver_that_takes_more_than_anybody_knew_makes_the_plan_smaller(
    home: Home, card_library: Path, tmp_path: Path
) -> None:
    """Given a card on which the first plan runs out of memory, a smaller one answers."""
    card = StandIn(tmp_path, card_library, overhead_mib=330)
    card.take(5900 - 480)
    stack(home, card, "chat")
    home.start(timeout_s=LOAD_TIMEOUT_S)

    deaths = told(home, "death", "chat")
    assert 1 <= len(deaths) <= 3
    assert {each["cause"] for each in deaths} == {"out of GPU memory"}
    given = [each["gpu_layers"] for each in told(home, "plan", "chat")]
    assert given == sorted(given, reverse=True)
    assert home.service("chat")["gpu_layers"] == given[-1] < given[0]
    assert answers(home, "chat") == "chat"
    assert "after it ran out of memory" in told(home, "plan", "chat")[-1]["why"]


def test_running_out_while_it_works_is_answered_by_a_smaller_plan(
    home: Home, card: StandIn
) -> None:
    """Given another program that takes all that is free, a prompt that needs more ends it.

    The prompt waits for what comes after it. Nobody sees it coming.
    """
    stack(home, card, "chat")
    home.write(home.profile.read_text().replace("[gpu]\n", '[gpu]\nrebalance = "off"\n'))
    home.start(timeout_s=LOAD_TIMEOUT_S)
    before = home.service("chat")
    card.take(int(card.free_mib))
    card.need(32)
    assert answers(home, "chat", prompt="Tell me about a dog that went to sea. " * 60) == "chat"
    after = home.wait_replaced(before, deadline_s=90)

    (death,) = told(home, "death", "chat")
    assert death["cause"] == "out of GPU memory"
    assert after["gpu_layers"] < before["gpu_layers"]
    assert answers(home, "chat") == "chat"


def test_a_killed_server_gets_its_memory_again(home: Home, card: StandIn) -> None:
    card.take(5900 - 600)
    stack(home, card, "chat", "code")
    home.start(timeout_s=LOAD_TIMEOUT_S)
    before = home.service("chat")
    os.kill(before["pid"], signal.SIGKILL)
    after = home.wait_replaced(before, deadline_s=60)

    assert after["gpu_layers"] >= before["gpu_layers"]
    assert answers(home, "chat") == "chat"


def test_a_fixed_number_of_layers_waits_for_another_program_to_end(
    home: Home, card: StandIn
) -> None:
    card.take(5800)
    stack(home, card, "chat", gpu_layers='"all"')
    result = home.cli("start", str(home.profile))
    assert result.returncode == 1
    assert "chat failed: " in result.stderr
    assert told(home, "death", "chat") == []

    card.give_back()
    home.wait_state("chat", "ready", deadline_s=60)
    assert answers(home, "chat") == "chat"


def test_an_outside_program_during_a_load_costs_no_failed_start(home: Home, card: StandIn) -> None:
    """Given 500 MiB that go in the middle of a load, both are up in the end, smaller or not."""
    card.take(5900 - 900)
    stack(home, card, "chat", "code")
    home.start("--no-wait")
    wait_until(lambda: bool(home.service("chat")["pid"]), "chat's process")
    time.sleep(0.2)
    card.take(500)
    for name in ("chat", "code"):
        home.wait_state(name, "ready", deadline_s=90)
        assert answers(home, name) == name


def test_a_killed_daemon_adopts_what_is_on_the_card(home: Home, card: StandIn) -> None:
    stack(home, card, "chat", "code")
    home.start(timeout_s=LOAD_TIMEOUT_S)
    names = ("chat", "code")
    before = {name: home.service(name) for name in names}
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: home.daemon_pid() is None, "the daemon's end")
    home.paths.memory.unlink()
    home.start(timeout_s=LOAD_TIMEOUT_S)

    for name in names:
        service = home.service(name)
        assert [service[k] for k in ("pid", "gpu_layers")] == [
            before[name][k] for k in ("pid", "gpu_layers")
        ]
        assert answers(home, name) == name
