"""A real llama-server does on the card what it is launched with, and nothing else."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.models import smollm2
from llmsup.config.schema import LlamaServer
from llmsup.core.options import Options
from llmsup.host import binaries, engine
from llmsup.services import llama_server
from tests.home import free_ports, wait_until
from tests.standin import StandIn

BINARY = binaries.llama_server(None, os.environ)
LAYERS = 31


@pytest.fixture
def card(tmp_path: Path, card_library: Path) -> StandIn:
    return StandIn(tmp_path, card_library)


@contextmanager
def loaded(card: StandIn, log: Path, options: Options | None, **keys: Any) -> Iterator[int]:
    """The process of a server that is ready; what it said is in `log`."""
    spec = LlamaServer(model=str(smollm2()), args=("--threads", "1", "--no-warmup"), **keys)
    launch = llama_server.launch(
        spec,
        name="chat",
        binary=BINARY,
        port=free_ports(1)[0],
        options=options,
        device="GPU-1",
        flags=engine.learn(BINARY, log.with_name("engines.json")).flags,
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launch.argv, *launch.once],
            env={**os.environ, **card.environ, **launch.env},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(
            lambda: process.poll() is not None or "all slots are idle" in log.read_text(),
            "the model is loaded",
            deadline_s=60,
            pause_s=0.1,
        )
        assert process.poll() is None, log.read_text()[-2000:]
        yield process.pid
    finally:
        process.kill()
        process.wait()


def effective(log: Path) -> dict[str, str]:
    """What the engine made of its options, in its own words."""
    text = log.read_text()
    found = dict(re.findall(r"llama_context: (\w+)\s+= (\S+)", text))
    offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", text)
    return found | {"layers": "" if offloaded is None else offloaded[0].split()[1]}


def test_options_take_effect_as_they_are(card: StandIn, tmp_path: Path) -> None:
    options = Options(
        12, ctx_size=1024, parallel=2, kv_unified=True, cache_type_k="q8_0", cache_type_v="q8_0",
        batch=256, ubatch=128, flash_attn="on",
    )  # fmt: skip
    log = tmp_path / "log"
    with loaded(card, log, options) as pid:
        assert card.used_by(pid) > 0

    found = effective(log)
    assert found["layers"] == f"12/{LAYERS}"
    assert (found["n_ctx"], found["n_seq_max"], found["kv_unified"]) == ("1024", "2", "true")
    assert (found["n_batch"], found["n_ubatch"]) == ("256", "128")
    assert found["flash_attn"] == "enabled"
    assert re.search(r"K \(q8_0\).*V \(q8_0\)", log.read_text())


def test_all_layers_are_all_without_a_plan(card: StandIn, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with loaded(card, log, None, gpu_layers="all"):
        assert effective(log)["layers"] == f"{LAYERS}/{LAYERS}"


@pytest.mark.parametrize("options", [None, Options(0)])
def test_what_is_off_the_card_takes_nothing_of_it(
    card: StandIn, tmp_path: Path, options: Options | None
) -> None:
    free_mib = card.free_mib
    log = tmp_path / "log"
    with loaded(card, log, options) as pid:
        assert card.used_by(pid) == 0
        assert card.free_mib == free_mib


@pytest.mark.parametrize(
    ("is_unified", "cells"), [(True, "n_ctx_seq = 2048"), (False, "n_ctx_seq = 512")]
)
def test_slots_share_a_cache_or_have_one_each(
    card: StandIn, tmp_path: Path, is_unified: bool, cells: str
) -> None:
    log = tmp_path / "log"
    with loaded(card, log, Options(LAYERS, ctx_size=2048, parallel=4, kv_unified=is_unified)):
        assert re.sub(r" +", " ", log.read_text()).count(cells) == 1
