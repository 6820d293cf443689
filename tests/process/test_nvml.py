"""Reading the card through the real binding and a library that says what a test wants."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cards import MIB, NAME, StubCards

READ_ON_DEMAND = """
import asyncio, json, sys
from dataclasses import asdict
from llmsup.core.device import Device
from llmsup.host.nvml import Nvml

async def main(device, timeout_s):
    nvml = Nvml(device, timeout_s)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    for _ in sys.stdin:
        ticks = 0
        reading = await nvml.read()
        if isinstance(reading, Device):
            said = asdict(reading)
        else:
            said = {"absence": reading.absence.name, "reason": reading.reason}
        print(json.dumps({**said, "ticks": ticks}), flush=True)

asyncio.run(main(json.loads(sys.argv[1]), float(sys.argv[2])))
"""


class Reader:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def read(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        return dict(said)

    def absence(self) -> tuple[str, str]:
        said = self.read()
        return said["absence"], said["reason"]


@contextmanager
def reader(
    environ: dict[str, str], device: int | str = 0, timeout_s: float = 20.0
) -> Iterator[Reader]:
    with subprocess.Popen(
        [sys.executable, "-c", READ_ON_DEMAND, json.dumps(device), str(timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    ) as process:
        try:
            yield Reader(process)
        finally:
            process.kill()


@pytest.fixture
def cards(tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    stub.write(stub.card())
    return stub


def test_a_card_is_read_in_full(cards: StubCards) -> None:
    with reader(cards.environ) as nvml:
        said = nvml.read()

    del said["ticks"]
    assert said == {
        "index": 0,
        "uuid": "GPU-1",
        "name": NAME,
        "driver": "560.35.03",
        "total_bytes": 6141 * MIB,
        "free_bytes": 3277 * MIB,
        "used_bytes": 2735 * MIB,
        "reserved_bytes": 129 * MIB,
        "utilization_percent": 7,
    }


def test_every_reading_is_fresh(cards: StubCards) -> None:
    with reader(cards.environ) as nvml:
        assert nvml.read()["free_bytes"] == 3277 * MIB
        cards.write(cards.card(free=100 * MIB))
        assert nvml.read()["free_bytes"] == 100 * MIB

    assert cards.calls("nvmlInitWithFlags") == 1


def test_what_wsl2_does_not_support_is_not_known(cards: StubCards) -> None:
    cards.write(cards.card(utilization=-1), "error nvmlDeviceGetMemoryInfo_v2 3")
    with reader(cards.environ) as nvml:
        said = nvml.read()

    assert (said["utilization_percent"], said["reserved_bytes"]) == (None, None)
    assert said["free_bytes"] == 3277 * MIB


@pytest.mark.parametrize(("device", "index"), [(0, 0), (1, 1), ("GPU-1", 0), ("GPU-2", 1)])
def test_a_card_is_chosen_by_index_or_uuid(cards: StubCards, device: int | str, index: int) -> None:
    cards.write(cards.card(), cards.card("GPU-2"))
    with reader(cards.environ, device) as nvml:
        said = nvml.read()

    assert (said["index"], said["uuid"]) == (index, f"GPU-{index + 1}")


@pytest.mark.parametrize(
    ("device", "lines", "reason"),
    [
        (0, [], "the NVIDIA driver has no card"),
        (2, [StubCards.card()], f"there is no card 2, only 0: {NAME}, GPU-1"),
        (
            2,
            [StubCards.card(), StubCards.card("GPU-2", name="NVIDIA T4")],
            f"there is no card 2, only 0: {NAME}, GPU-1; 1: NVIDIA T4, GPU-2",
        ),
        ("GPU-9", [StubCards.card()], f"there is no card GPU-9, only 0: {NAME}, GPU-1"),
    ],
)
def test_a_card_that_is_not_there(
    cards: StubCards, device: int | str, lines: list[str], reason: str
) -> None:
    cards.write(*lines)
    with reader(cards.environ, device) as nvml:
        assert nvml.absence() == ("NO_DEVICE", reason)
        cards.write(cards.card(), cards.card("GPU-9"), cards.card())
        assert nvml.read()["name"] == NAME


A100 = StubCards.card("GPU-8", name="NVIDIA A100")
INSTANCE = f"mig 1 MIG-1 {4864 * MIB} {4800 * MIB} {60 * MIB} NVIDIA A100 MIG 1g.5gb"


def test_an_instance_of_a_partitioned_card_is_read_by_its_uuid(cards: StubCards) -> None:
    cards.write(cards.card(), A100, INSTANCE)
    with reader(cards.environ, "MIG-1") as nvml:
        said = nvml.read()

        cards.write(cards.card())
        gone = nvml.absence()

    assert gone == ("NO_DEVICE", f"there is no card MIG-1, only 0: {NAME}, GPU-1")
    assert (said["uuid"], said["name"]) == ("MIG-1", "NVIDIA A100 MIG 1g.5gb")
    assert (said["total_bytes"], said["free_bytes"]) == (4864 * MIB, 4800 * MIB)
    assert (said["index"], said["utilization_percent"]) == (1, None)


@pytest.mark.parametrize("device", [1, "GPU-8"])
def test_a_partitioned_card_names_its_instances(cards: StubCards, device: int | str) -> None:
    cards.write(cards.card(), A100, INSTANCE)
    with reader(cards.environ, device) as nvml:
        assert nvml.absence() == (
            "NO_DEVICE",
            "NVIDIA A100, GPU-8 is partitioned (MIG); name one of its instances as gpu.device: "
            "NVIDIA A100 MIG 1g.5gb, MIG-1",
        )
        cards.write(cards.card(), A100, "mig 1")
        assert nvml.absence()[1] == (
            "NVIDIA A100, GPU-8 is partitioned (MIG) and has no instance; nvidia-smi mig makes one"
        )
        cards.write(cards.card(), A100)
        assert nvml.read()["uuid"] == "GPU-8"


@pytest.mark.parametrize("code", [3, 13, 999])
def test_a_driver_that_knows_of_no_partitions_has_whole_cards(cards: StubCards, code: int) -> None:
    cards.write(cards.card(), f"error nvmlDeviceGetMigMode {code}")
    with reader(cards.environ) as nvml:
        assert nvml.read()["uuid"] == "GPU-1"


def test_a_machine_without_a_driver(tmp_path: Path) -> None:
    """Given no library, the binding is not even imported."""
    program = (
        "import asyncio, sys; from llmsup.host.nvml import Nvml\n"
        "print(asyncio.run(Nvml().read()).absence.name, 'pynvml' in sys.modules)"
    )
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )

    assert said.stdout.split() == ["NO_LIBRARY", "False"]


@pytest.mark.parametrize(
    ("function", "code", "absence", "name"),
    [
        ("nvmlInitWithFlags", 9, "NO_DRIVER", "DRIVER_NOT_LOADED"),
        ("nvmlInitWithFlags", 18, "MISMATCH", "LIB_RM_VERSION_MISMATCH"),
        ("nvmlInitWithFlags", 4, "NO_PERMISSION", "NO_PERMISSION"),
        ("nvmlInitWithFlags", 999, "ERROR", "UNKNOWN"),
        ("nvmlDeviceGetCount_v2", 17, "ERROR", "OPERATING_SYSTEM"),
        ("nvmlDeviceGetHandleByIndex_v2", 15, "LOST", "GPU_IS_LOST"),
        ("nvmlDeviceGetMemoryInfo_v2", 15, "LOST", "GPU_IS_LOST"),
        ("nvmlDeviceGetUtilizationRates", 15, "LOST", "GPU_IS_LOST"),
        ("nvmlDeviceGetName", 12345, "ERROR", "12345"),
    ],
)  # fmt: skip
def test_every_error_is_a_value_with_its_name(
    cards: StubCards, function: str, code: int, absence: str, name: str
) -> None:
    cards.write(cards.card(), f"error {function} {code}")
    with reader(cards.environ) as nvml:
        said = nvml.absence()
        cards.write(cards.card())
        assert nvml.read()["name"] == NAME

    assert said[0] == absence
    assert said[1].endswith(f"(NVML: {name})")


def test_a_driver_that_was_loaded_anew_is_initialised_anew(cards: StubCards) -> None:
    with reader(cards.environ) as nvml:
        nvml.read()
        cards.write(cards.card(), "epoch 2")
        assert nvml.absence()[0] == "LOST"
        assert nvml.read()["name"] == NAME
        cards.unload()
        assert nvml.absence()[0] == "NO_DRIVER"
        cards.write(cards.card(), "epoch 3")
        assert nvml.read()["name"] == NAME

    assert cards.calls("nvmlShutdown") == 2


@pytest.mark.parametrize(
    "lie",
    [
        StubCards.card(total=0, free=0, used=0),
        StubCards.card(free=6142 * MIB),
        StubCards.card(free=2**64 - 1),
        StubCards.card(used=6142 * MIB),
        StubCards.card(name="\udcff"),
    ],
)
def test_figures_that_cannot_be_true_are_refused(cards: StubCards, lie: str) -> None:
    cards.write(lie)
    with reader(cards.environ) as nvml:
        absence, reason = nvml.absence()
        assert (absence, reason.startswith("NVML")) == ("UNBELIEVABLE", True)
        cards.write(cards.card())
        assert nvml.read()["name"] == NAME


def test_a_driver_that_hangs_blocks_nobody_and_is_not_called_twice(cards: StubCards) -> None:
    with reader(cards.environ, timeout_s=0.5) as nvml:
        nvml.read()
        before = cards.calls("nvmlDeviceGetMemoryInfo_v2")
        cards.write(cards.card(), "delay nvmlDeviceGetMemoryInfo_v2 60000")
        said = nvml.read()
        assert said["absence"] == "SILENT"
        assert said["ticks"] > 5
        cards.write(cards.card())
        assert [nvml.absence()[0] for _ in range(3)] == ["SILENT"] * 3
        assert cards.calls("nvmlDeviceGetMemoryInfo_v2") == before + 1
        assert nvml.process.stdin is not None
        nvml.process.stdin.close()
        ended = time.monotonic()
        assert nvml.process.wait(20) == 0
        assert time.monotonic() - ended < 15


def test_a_driver_that_was_slow_is_read_again(cards: StubCards) -> None:
    cards.write(cards.card(), "delay nvmlInitWithFlags 1500")
    with reader(cards.environ, timeout_s=0.1) as nvml:
        assert nvml.read()["absence"] == "SILENT"
        cards.write(cards.card())
        deadline = time.monotonic() + 20
        while "absence" in (said := nvml.read()) and time.monotonic() < deadline:
            time.sleep(0.05)

    assert said.get("name") == NAME
