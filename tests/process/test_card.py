"""A real daemon with stub servers and a card that comes and goes."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cards import MIB, StubCards
from tests.gguf_files import gguf
from tests.home import STUBS, Home, free_ports, wait_until

SERVER = """#!{python}
import os, sys
port = sys.argv[sys.argv.index("--port") + 1]
os.execv({python!r}, [{python!r}, {stub!r}, "--port", port])
"""
LOST = "error nvmlDeviceGetMemoryInfo_v2 15"


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    """A card, for the daemons of this home."""
    stub = StubCards(tmp_path)
    stub.write(stub.card())
    home.environ |= stub.environ
    return stub


def start(home: Home, gpu: str = "") -> None:
    """Two model servers with layers on the card, and two services that do not use it."""
    binary = home.root / "llama-server"
    binary.write_text(SERVER.format(python=sys.executable, stub=str(STUBS / "upstream.py")))
    binary.chmod(0o755)
    model = home.root / "model.gguf"
    model.write_bytes(gguf())
    text = home.command("rag", ["sleep", "1000"])
    layers = {"chat": '"all"', "code": "20", "embedding": "0"}
    for (name, count), port in zip(layers.items(), free_ports(3), strict=True):
        text += (
            f'[service.{name}]\nkind = "llama-server"\nbinary = "{binary}"\n'
            f'model = "{model}"\nport = {port}\ngpu_layers = {count}\n'
            'readiness = { period = "200ms" }\ndrain_timeout = "1s"\n'
        )
    home.write(f"[gpu]\n{gpu}\n{text}")
    home.start()


def generations(home: Home) -> dict[str, int]:
    return {each["service"]: each["generation"] for each in home.status()["services"]}


def told(home: Home) -> list[str]:
    return [each["why"] for each in home.events() if each["event"] == "card"]


def wait_gpu(home: Home, free_mib: int | None) -> dict[str, Any]:
    def is_so() -> bool:
        gpu = home.status()["gpu"]
        return (None if gpu is None else gpu["free_bytes"]) == (
            None if free_mib is None else free_mib * MIB
        )

    wait_until(is_so, f"a card with {free_mib} MiB free", pause_s=0.05)
    return home.status()


def test_status_shows_the_card_as_it_is(home: Home, cards: StubCards) -> None:
    start(home)
    status = wait_gpu(home, 3277)
    cards.write(cards.card(free=512 * MIB))
    wait_gpu(home, 512)

    lines = home.cli("status").stdout.splitlines()

    assert (status["gpu"]["total_bytes"], status["gpu_why"]) == (6141 * MIB, "")
    assert lines[1] == "RTX 4050 Laptop GPU · 0.5 of 6.0 GiB free"


def test_the_card_that_the_profile_names_is_the_one(home: Home, cards: StubCards) -> None:
    cards.write(cards.card(), cards.card("GPU-2", name="NVIDIA T4", free=512 * MIB))
    start(home, 'device = "GPU-2"')

    assert wait_gpu(home, 512)["gpu"]["name"] == "NVIDIA T4"

    cards.write(cards.card())
    wait_until(
        lambda: home.status()["gpu_why"].startswith("there is no card GPU-2, only 0: NVIDIA"),
        "the card is missed",
        pause_s=0.05,
    )


def test_a_card_that_is_not_asked_after_is_left_alone(home: Home, cards: StubCards) -> None:
    """Given somebody who asks for the status all the time, the card is read once a second."""
    start(home)
    wait_gpu(home, 3277)
    before, started = cards.calls("nvmlDeviceGetName"), time.monotonic()
    while time.monotonic() - started < 3.0:
        home.status()
    elapsed_s = time.monotonic() - started

    assert 1 <= cards.calls("nvmlDeviceGetName") - before <= elapsed_s + 1


def test_a_lost_card_restarts_what_uses_it_once_and_only_when_it_is_back(
    home: Home, cards: StubCards
) -> None:
    start(home)
    wait_gpu(home, 3277)
    before = generations(home)
    old = {name: home.service(name) for name in ("chat", "code")}

    cards.write(cards.card(), LOST)
    status = wait_gpu(home, None)
    tries = cards.calls("nvmlInitWithFlags")
    wait_until(lambda: home.status() != {} and cards.calls("nvmlInitWithFlags") > tries + 2,
               "readings that fail", pause_s=0.1)  # fmt: skip

    assert status["gpu_why"] == (
        "the card is lost (NVML: GPU_IS_LOST); "
        "the services that use it are restarted once it is back"
    )
    assert "no GPU: the card is lost" in home.cli("status").stdout
    assert generations(home) == before

    cards.write(cards.card())
    for name in ("chat", "code"):
        home.wait_replaced(old[name])
    looks = cards.calls("nvmlDeviceGetName")
    wait_until(lambda: home.status() != {} and cards.calls("nvmlDeviceGetName") > looks + 2,
               "readings that succeed", pause_s=0.1)  # fmt: skip

    renewed = {name: before[name] + 1 for name in ("chat", "code")}
    assert generations(home) == {**before, **renewed}
    lost, back = told(home)
    assert lost == "lost: the card is lost (NVML: GPU_IS_LOST)"
    assert back.startswith("back after ")
    assert back.endswith("; restarting chat, code")
    assert re.search(r"  card +lost: the card is lost", home.cli("events").stdout)


def test_a_driver_that_hangs_holds_nobody_up(home: Home, cards: StubCards) -> None:
    start(home)
    wait_gpu(home, 3277)
    before = generations(home)
    reads = cards.calls("nvmlDeviceGetMemoryInfo_v2")
    cards.write(cards.card(), "delay nvmlDeviceGetMemoryInfo_v2 600000")
    wait_until(
        lambda: home.status() != {} and cards.calls("nvmlDeviceGetMemoryInfo_v2") > reads,
        "a call that hangs",
        pause_s=0.1,
    )

    status = wait_gpu(home, None)

    assert status["gpu_why"].startswith("the NVIDIA driver has not answered for ")
    assert generations(home) == before
    assert told(home) == []
    assert home.cli("restart", "--daemon").returncode == 0
    assert generations(home) == before
    assert home.cli("stop").returncode == 0


def test_a_machine_without_a_card(home: Home, cards: StubCards) -> None:
    """Given a driver that is not loaded, the status says so, and it is not asked all the time."""
    cards.unload()
    start(home)
    wait_until(lambda: "not loaded" in home.status()["gpu_why"], "a reason", pause_s=0.1)
    tries = cards.calls("nvmlInitWithFlags")
    time.sleep(2.0)

    assert home.status()["gpu"] is None
    assert "no GPU: the NVIDIA driver is not loaded" in home.cli("status").stdout
    assert cards.calls("nvmlInitWithFlags") == tries
