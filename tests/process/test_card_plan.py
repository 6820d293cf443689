"""A real daemon that plans a card which does not exist; its stub servers really take memory."""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmsup.control.client import Client
from tests.cards import MIB, StubCards
from tests.gguf_files import SMALL, Entry, write_sparse
from tests.home import STUBS, Home, free_ports, wait_until

LAYERS = 20
"""Of the test's model; with the output layer there is one more for the card."""
LAYER_MIB = 64
TOTAL_MIB = 6141


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    set_free(stub, 5900)
    home.environ |= stub.environ
    return stub


def set_free(cards: StubCards, mib: int) -> None:
    """What the services of this home and nobody else may share."""
    used = TOTAL_MIB - mib
    cards.write(cards.card(total=TOTAL_MIB * MIB, free=mib * MIB, used=used * MIB))


def model(home: Home) -> Path:
    tensors: list[Entry] = [("token_embd.weight", (4096, 100), 0)]
    tensors += [(f"blk.{layer}.ffn_up.weight", (4096, 4096), 0) for layer in range(LAYERS)]
    tensors.append(("output.weight", (4096, 100), 0))
    metadata = {
        **SMALL,
        "llama.block_count": ("u32", LAYERS),
        "llama.embedding_length": ("u32", 4096),
        "llama.feed_forward_length": ("u32", 4096),
        "llama.attention.head_count": ("u32", 32),
        "llama.attention.head_count_kv": ("u32", 2),
    }
    return write_sparse(home.root / "model.gguf", metadata, tensors)


def profile(home: Home, services: dict[str, dict[str, Any]], gpu: str = "") -> None:
    """A profile of stub servers; `services` have their keys, and `env`."""
    binary = home.root / "llama-server"
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {STUBS / "card_server.py"} "$@"\n')
    binary.chmod(0o755)
    text = gpu
    for (name, keys), port in zip(services.items(), free_ports(len(services)), strict=True):
        text += (
            f'[service.{name}]\nkind = "llama-server"\nbinary = "{binary}"\n'
            f'model = "{model(home)}"\nport = {port}\ndrain_timeout = "1s"\n'
            'readiness = { period = "200ms" }\nrestart = { backoff = "100ms" }\n'
        )
        for key, value in keys.items():
            words = ", ".join(f'{each} = "{text}"' for each, text in value.items()) if (
                isinstance(value, dict)) else ""  # fmt: skip
            text += f"{key} = {{ {words} }}\n" if words else f"{key} = {json.dumps(value)}\n"
    home.write(text)


def spawned(home: Home) -> list[str]:
    """The services in the order in which they were planned."""
    return [each["service"] for each in home.events() if each["event"] == "plan"]


def plans(home: Home, name: str) -> list[dict[str, Any]]:
    return [e for e in home.events() if e["event"] == "plan" and e.get("service") == name]


def when(home: Home, name: str, state: str) -> float:
    """The first time that the service was in that state."""
    return next(
        float(each["at_s"])
        for each in home.events()
        if each["event"] == "state" and (each["service"], each["state"]) == (name, state)
    )


def layers(home: Home, name: str) -> int:
    return int(home.service(name)["gpu_layers"])


def test_loads_are_one_after_another_in_order_of_rank(home: Home, cards: StubCards) -> None:
    slow = {"LOADS_S": "0.5"}
    profile(
        home,
        {
            "code": {"env": slow},
            "chat": {"priority": 10, "env": slow},
            "embedding": {"pinned": True, "env": slow},
        },
    )
    home.start()

    assert spawned(home) == ["embedding", "chat", "code"]
    for first, second in (("embedding", "chat"), ("chat", "code")):
        assert when(home, first, "ready") <= plans(home, second)[0]["at_s"]
    assert home.service("chat")["measured_bytes"] == 500 * MIB


def test_each_is_planned_with_what_the_one_before_really_took(home: Home, cards: StubCards) -> None:
    """Given a server that takes far more than was planned, the next one gets less."""
    profile(home, {"chat": {"priority": 10, "env": {"TAKES_MIB": "4800"}}, "code": {}})
    home.start()

    assert plans(home, "code")[0]["free_mib"] == 5900 - 4800
    assert layers(home, "chat") == LAYERS + 1
    assert 0 < layers(home, "code") < LAYERS + 1


def test_a_service_says_what_it_waits_for(home: Home, cards: StubCards) -> None:
    profile(
        home,
        {"chat": {"priority": 10, "env": {"LOADS_S": "1000"}}, "code": {"stall_timeout": "1s"}},
    )
    home.start("--no-wait")
    wait_until(
        lambda: home.service("code")["why"] == "waits for the card: chat is loading", "a reason"
    )
    before = home.service("code")
    pid = home.wait_state("chat", "starting")["pid"]

    # Stopped while it waits, it leaves nothing behind; started again, it waits again.
    assert home.cli("stop", "code").returncode == 0
    assert home.service("code")["state"] == "stopped"
    Client(home.paths).start(["code"])
    wait_until(lambda: "chat is loading" in home.service("code")["why"], "the same reason")
    assert home.service("code")["generation"] == before["generation"] + 1

    # The turn is given back by a stop in the middle of a load.
    assert home.cli("stop", "chat").returncode == 0
    assert not Path(f"/proc/{pid}").exists()
    home.wait_state("code", "ready")


def test_memory_that_is_on_its_way_back_is_waited_for(home: Home, cards: StubCards) -> None:
    """Given a driver that gives memory back late, a restarted service gets what it had."""
    profile(home, {"chat": {"env": {"TAKES_MIB": "5000"}}})
    cards.write("linger 1500", cards.card(total=TOTAL_MIB * MIB, free=5900 * MIB, used=241 * MIB))
    home.start()
    os.kill(home.service("chat")["pid"], signal.SIGKILL)
    wait_until(lambda: len(plans(home, "chat")) == 2, "a new plan")
    home.wait_state("chat", "ready")

    first, second = plans(home, "chat")
    assert second["free_mib"] == first["free_mib"] == 5900
    assert second["gpu_layers"] == LAYERS + 1


def test_running_out_of_memory_ends_on_the_cpu_and_is_no_crash_loop(
    home: Home, cards: StubCards
) -> None:
    profile(home, {"chat": {"env": {"RUNS_OUT_ABOVE": "0"}}})
    home.start()

    given = [each["gpu_layers"] for each in plans(home, "chat")]
    assert given == sorted(given, reverse=True)
    assert (given[0], given[-1], len(given)) == (LAYERS + 1, 0, 4)
    chat = home.service("chat")
    assert (chat["state"], chat["gpu_layers"], chat["planned_bytes"]) == ("ready", 0, 0)
    deaths = [each for each in home.events() if each["event"] == "death"]
    assert {each["cause"] for each in deaths} == {"out of GPU memory"}
    assert {each["next"] for each in deaths} == {"restarted at once"}
    assert "it had 21 of 21 layers" in deaths[0]["why"]
    assert f"{given[0]} → {given[1]} layers after it ran out" in plans(home, "chat")[1]["why"]
    kept = json.loads(home.cli("why", "chat", "--json").stdout)["deaths"]
    assert [each["plan"]["gpu_layers"] for each in kept] == given[:-1][::-1]
    assert kept[0]["plan"]["free_bytes"] == 5900 * MIB


def test_one_step_is_enough_where_a_little_was_missing(home: Home, cards: StubCards) -> None:
    profile(home, {"chat": {"env": {"RUNS_OUT_ABOVE": str(LAYERS), "MISSES_MIB": "70"}}})
    home.start()
    given = [each["gpu_layers"] for each in plans(home, "chat")]
    assert len(given) == 2
    assert 0 < given[1] <= LAYERS


def test_a_daemon_knows_with_how_much_a_server_ran_out_under_the_one_before(
    home: Home, cards: StubCards
) -> None:
    profile(home, {"chat": {"env": {"RUNS_OUT_ABOVE": str(LAYERS), "MISSES_MIB": "10"}}})
    home.start()
    before = home.service("chat")
    assert len(plans(home, "chat")) > 1
    kill_daemon(home)
    home.start()
    assert home.service("chat")["pid"] == before["pid"]

    os.kill(before["pid"], signal.SIGKILL)
    home.wait_replaced(before, deadline_s=60)
    assert layers(home, "chat") <= LAYERS
    deaths = [each["cause"] for each in home.events() if each["event"] == "death"]
    assert deaths.count("out of GPU memory") == 1


def test_a_fixed_number_of_layers_that_does_not_fit_is_refused_with_the_arithmetic(
    home: Home, cards: StubCards
) -> None:
    """Given memory that comes free, it is started without anybody's asking."""
    profile(home, {"chat": {"gpu_layers": "all", "priority": 10}, "code": {}})
    set_free(cards, 700)
    result = home.cli("start", str(home.profile))

    assert result.returncode == 1
    assert "chat failed: " in result.stderr
    assert "MiB" in home.service("chat")["why"]
    assert home.service("chat")["restarts"] == 0
    home.wait_state("code", "ready")

    set_free(cards, 5900)
    home.wait_state("chat", "ready")
    assert layers(home, "chat") == LAYERS + 1


def test_a_fixed_number_of_layers_that_ran_out_waits_for_more_room(
    home: Home, cards: StubCards
) -> None:
    """Given a load that fits by all figures and still runs out, it is not tried again and again."""
    set_free(cards, 3000)
    profile(home, {"chat": {"gpu_layers": 5, "env": {"RUNS_OUT_ABOVE": "0"}}})
    assert home.cli("start", str(home.profile)).returncode == 1

    chat = home.wait_state("chat", "failed")
    assert "tried again once there is room" in chat["why"]
    (death,) = [each for each in home.events() if each["event"] == "death"]
    assert "its profile allows no smaller plan" in death["why"]
    assert len(plans(home, "chat")) == 1

    set_free(cards, 5900)
    wait_until(lambda: len(plans(home, "chat")) > 1, "another try")


def test_a_card_smaller_than_everything_serves_from_the_cpu(home: Home, cards: StubCards) -> None:
    profile(home, {"chat": {}, "code": {}})
    set_free(cards, 100)
    home.start()
    assert (layers(home, "chat"), layers(home, "code")) == (0, 0)


def test_without_a_card_everything_is_on_the_cpu_and_that_is_said_once(
    home: Home, cards: StubCards
) -> None:
    profile(home, {"chat": {}, "code": {}, "embedding": {}})
    cards.unload()
    home.start()

    assert [layers(home, name) for name in ("chat", "code", "embedding")] == [0, 0, 0]
    told = [each["why"] for each in home.events() if each["event"] == "card"]
    assert told == [
        "none, models run on the CPU: the NVIDIA driver is not loaded (NVML: DRIVER_NOT_LOADED)"
    ]


def test_a_card_that_comes_after_the_services_is_used(home: Home, cards: StubCards) -> None:
    """Given a driver that is loaded while the machine starts, later than the daemon."""
    profile(home, {"chat": {}, "code": {"gpu_layers": 5}})
    cards.unload()
    home.start()
    before = [home.service(name) for name in ("chat", "code")]
    set_free(cards, 5900)
    os.kill(before[0]["pid"], signal.SIGKILL)  # the card is looked for now, not in a minute
    for each in before:
        home.wait_replaced(each)

    assert (layers(home, "chat"), layers(home, "code")) == (LAYERS + 1, 5)
    wait_until(lambda: home.service("code")["measured_bytes"] == 500 * MIB, "it is on the card")
    told = [each["why"] for each in home.events() if each["event"] == "card"]
    assert told[1:] == ["there now; restarting code"]


def test_nvml_that_fails_in_the_middle_stops_nobody_from_being_started(
    home: Home, cards: StubCards
) -> None:
    profile(home, {"chat": {"priority": 10}, "code": {}})
    home.start()
    cards.write(
        cards.card(total=TOTAL_MIB * MIB, free=5900 * MIB), "error nvmlDeviceGetMemoryInfo_v2 999"
    )
    old = home.service("code")
    os.kill(old["pid"], signal.SIGKILL)
    home.wait_replaced(old, deadline_s=60)
    assert home.service("chat")["measured_bytes"] == 500 * MIB


@pytest.mark.parametrize("has_memory", [True, False], ids=["with memory", "memory file lost"])
def test_a_killed_daemon_leaves_servers_that_the_next_one_knows_to_be_current(
    home: Home, cards: StubCards, *, has_memory: bool
) -> None:
    profile(home, {"chat": {"priority": 10, "env": {"TAKES_MIB": "4800"}}, "code": {}})
    home.start()
    names = ("chat", "code")
    before = {name: home.service(name) for name in names}
    wait_until(lambda: 'measured_bytes":5033164800' in home.paths.memory.read_text(), "saved")
    kill_daemon(home)
    if not has_memory:
        home.paths.memory.unlink()
    home.start()

    after = {name: home.service(name) for name in names}
    for name in names:
        for key in ("pid", "generation", "gpu_layers"):
            assert after[name][key] == before[name][key]
        assert after[name]["planned_bytes"] > 0
    measured = after["chat"]["measured_bytes"]
    assert measured == (4800 * MIB if has_memory else None)
    assert len(plans(home, "chat")) == 1


def kill_daemon(home: Home) -> None:
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: home.daemon_pid() is None, "the daemon's end")


def test_a_hand_over_in_the_middle_of_a_load_loses_no_turn(home: Home, cards: StubCards) -> None:
    profile(home, {"chat": {"priority": 10, "env": {"LOADS_S": "3"}}, "code": {}})
    home.start("--no-wait")
    wait_until(lambda: "chat is loading" in home.service("code")["why"], "code waits")
    pid = home.service("chat")["pid"]
    assert home.cli("restart", "--daemon").returncode == 0
    for name in ("chat", "code"):
        home.wait_state(name, "ready")

    assert home.service("chat")["pid"] == pid
    assert when(home, "chat", "ready") <= plans(home, "code")[0]["at_s"]


def test_a_launch_that_fails_once_it_has_the_turn_gives_it_back(
    home: Home, cards: StubCards
) -> None:
    profile(home, {"chat": {"priority": 10}, "code": {}})
    text = home.profile.read_text()
    broken = text.replace(f'"{home.root / "llama-server"}"', '"/nonexistent/llama-server"', 1)
    home.profile.write_text(broken)
    assert home.cli("start", str(home.profile)).returncode == 1

    assert home.service("chat")["state"] == "failed"
    assert "/nonexistent/llama-server" in home.service("chat")["why"]
    assert home.wait_state("code", "ready")["gpu_layers"] == LAYERS + 1


def test_a_daemon_killed_in_the_middle_of_a_load_leaves_the_turn_to_who_is_loading(
    home: Home, cards: StubCards
) -> None:
    profile(home, {"chat": {"priority": 10, "env": {"LOADS_S": "3"}}, "code": {}})
    home.start("--no-wait")
    wait_until(lambda: bool(home.service("chat")["pid"]), "chat's process")
    pid = home.service("chat")["pid"]
    kill_daemon(home)
    home.start()

    assert home.service("chat")["pid"] == pid
    assert when(home, "chat", "ready") <= plans(home, "code")[0]["at_s"]
    assert plans(home, "code")[0]["free_mib"] == 5400


def loads(home: Home) -> list[tuple[float, float, str]]:
    """When each load onto the card began and was over, however it ended, in order."""
    found = []
    for plan in (each for each in home.events() if each["event"] == "plan"):
        if plan["gpu_layers"] == 0:
            continue
        over = (
            each["at_s"]
            for each in home.events()
            if each["event"] == "state"
            and each["service"] == plan["service"]
            and each["at_s"] > plan["at_s"]
            and (each["generation"] != plan["generation"] or each["state"] != "starting")
        )
        found.append((plan["at_s"], next(over, float("inf")), plan["service"]))
    return sorted(found)


def test_whatever_dies_or_is_stopped_loads_never_overlap_and_all_come_up_in_the_end(
    home: Home, cards: StubCards
) -> None:
    names = ("chat", "code", "embedding", "rerank")
    chance = random.Random(4)
    keys = {"env": {"LOADS_S": "0.2", "TAKES_MIB": "700"}, "stall_timeout": "20s"}
    profile(home, {name: {**keys, "priority": 10 - n} for n, name in enumerate(names)})
    home.start()
    client = Client(home.paths)
    for _ in range(25):
        name = chance.choice(names)
        pid = home.service(name)["pid"]
        match chance.choice(["kill", "kill", "stop", "start", "restart"]):
            case "kill" if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            case "stop":
                client.stop([name], now=True)
            case "start":
                client.start([name])
            case "restart":
                client.restart([name], now=True)
        time.sleep(chance.random() * 0.5)
    client.start(names)
    for name in names:
        client.restart([name], now=True)
        home.wait_state(name, "ready", deadline_s=60)

    all_loads = loads(home)
    for (_, over, first), (begun, _, second) in pairwise(all_loads):
        assert over <= begun, f"{first} and {second} loaded at the same time"
    assert len(all_loads) > len(names)
    assert {each["gpu_layers"] for each in map(home.service, names)} == {LAYERS + 1}
    assert {each["measured_bytes"] for each in map(home.service, names)} <= {700 * MIB, None}


def test_a_reload_restarts_what_a_plan_would_not_give_any_more(
    home: Home, cards: StubCards
) -> None:
    """Given fewer layers in the profile, the old process is outdated; another's is not."""
    profile(home, {"chat": {}, "code": {}})
    home.start()
    chat, code = home.service("chat"), home.service("code")
    text = home.profile.read_text()
    table = "[service.chat]\n"
    home.profile.write_text(text.replace(table, f"{table}gpu_layers = 5\n"))
    assert home.cli("reload").returncode == 0
    home.wait_replaced(chat)

    assert layers(home, "chat") == 5
    assert home.service("code")["pid"] == code["pid"]


def test_the_plan_that_is_shown_is_the_one_that_is_carried_out(
    home: Home, cards: StubCards
) -> None:
    """Given servers that take what was planned, before the start and while they are up."""
    set_free(cards, 2500)

    def shown() -> dict[str, dict[str, Any]]:
        result = home.cli("plan", str(home.profile), "--json")
        assert result.returncode == 0, result.stderr
        return {each["service"]: each for each in json.loads(result.stdout)["services"]}

    profile(home, {"chat": {"priority": 10}, "code": {}})
    before = shown()
    takes = {name: str(each["total_bytes"] / MIB) for name, each in before.items()}
    profile(
        home,
        {
            "chat": {"priority": 10, "env": {"TAKES_MIB": takes["chat"]}},
            "code": {"env": {"TAKES_MIB": takes["code"]}},
        },
    )
    home.start()

    carried_out = {name: layers(home, name) for name in before}
    assert carried_out == {name: each["gpu_layers"] for name, each in before.items()}
    assert carried_out["chat"] == LAYERS + 1
    assert 0 < carried_out["code"] < LAYERS + 1
    assert {name: each["gpu_layers"] for name, each in shown().items()} == carried_out
    table = home.cli("status").stdout
    assert f"{LAYERS + 1}/{LAYERS + 1}" in table
    assert f"{carried_out['code']}/{LAYERS + 1}" in table


def test_a_server_on_the_card_is_asked_once_before_it_is_ready(
    home: Home, cards: StubCards
) -> None:
    """And not again by the next daemon, which adopts it; what is off the card is not asked."""
    profile(home, {"chat": {}, "code": {"gpu_layers": 0}})
    home.start()

    def asked(name: str) -> int:
        told = httpx.get(f"http://127.0.0.1:{home.service(name)['port']}/stub").json()
        return int(told["requests"].get("/completion", 0))

    assert (asked("chat"), asked("code")) == (1, 0)
    before = home.service("chat")["pid"]
    assert home.cli("restart", "--daemon").returncode == 0
    home.wait_state("chat", "ready")
    assert home.service("chat")["pid"] == before
    assert asked("chat") == 1


def test_memory_of_what_the_profile_no_longer_has_is_waited_for(
    home: Home, cards: StubCards
) -> None:
    """Given one model for another: its process is nobody's, and is ended after the reload."""
    keys = {"env": {"TAKES_MIB": "4800"}}
    profile(home, {"chat": {}, "old": keys})
    home.start()
    text = home.profile.read_text()
    home.profile.write_text(text.replace("[service.old]", "[service.new]"))
    assert home.cli("reload").returncode == 0
    home.wait_state("new", "ready")

    (plan,) = plans(home, "new")
    assert plan["free_mib"] == 5400
    assert layers(home, "new") == LAYERS + 1


def test_a_server_that_counts_as_ready_before_it_has_loaded_keeps_its_turn(
    home: Home, cards: StubCards
) -> None:
    """Given readiness.tcp: llama-server listens first, and loads its model then."""
    profile(home, {"chat": {"priority": 10, "env": {"LISTENS_S": "2"}}, "code": {}})
    text = home.profile.read_text()
    home.profile.write_text(text.replace("readiness = { ", "readiness = { tcp = true, ", 1))
    home.start()

    assert plans(home, "code")[0]["free_mib"] == 5400
    assert home.service("chat")["measured_bytes"] == 500 * MIB


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_whatever_happens_to_a_server_in_the_middle_of_its_load_its_turn_comes_back(
    home: Home, cards: StubCards, number: signal.Signals
) -> None:
    profile(
        home,
        {
            "chat": {
                "priority": 10,
                "env": {"LOADS_S": "3"},
                "stall_timeout": "5s",
                "grace_period": "1s",
            },
            "code": {},
        },
    )
    home.start("--no-wait")
    wait_until(lambda: bool(home.service("chat")["pid"]), "chat's process")
    before = home.service("chat")
    os.kill(before["pid"], number)
    home.wait_replaced(before, deadline_s=60)
    home.wait_state("code", "ready", deadline_s=60)

    assert {each["gpu_layers"] for each in map(home.service, ("chat", "code"))} == {LAYERS + 1}
    (_, over, _), (begun, _, _) = loads(home)[:2]
    assert over <= begun
