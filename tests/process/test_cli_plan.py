"""`llmsup plan` as a process: on a card, without one, and asked what if."""

import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmsup.config.load import load
from llmsup.core.device import Device
from llmsup.core.ledger import Ledger, Record
from llmsup.host import ledger
from llmsup.sizing import Sizing
from tests.cards import MIB, NAME, StubCards
from tests.fake_daemon import FakeStack, held, service, serving
from tests.home import LLMSUP, Home
from tests.qwen_files import QWEN_3B, QWEN_7B, TINY, write_qwen

SERVICE_KEYS = [
    "service", "model", "gpu_layers", "layers", "n_cpu_moe", "ctx_size", "parallel", "kv_unified",
    "cache_type_k", "cache_type_v", "batch", "ubatch", "flash_attn", "weights_bytes",
    "kv_cache_bytes", "compute_bytes", "overhead_bytes", "total_bytes", "host_bytes", "reason",
]  # fmt: skip
LAPTOP = ("--total", "6141", "--free", "5800")
DUAL = """
[gpu]
ceiling = "100%"
headroom = "256MiB"
[service.chat]
kind = "llama-server"
model = "3b.gguf"
priority = 10
[service.code]
kind = "llama-server"
model = "7b.gguf"
priority = 5
ctx_size = 8192
cache_type_k = "q8_0"
cache_type_v = "q8_0"
"""


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    """The driver as this home sees it; not loaded until a card is written."""
    stub = StubCards(tmp_path)
    home.environ |= stub.environ
    return stub


@pytest.fixture
def dual(home: Home, cards: StubCards) -> Home:
    """A 3B and a 7B model, as on a laptop; without a GPU."""
    write_qwen(home.root / "3b.gguf", QWEN_3B)
    write_qwen(home.root / "7b.gguf", QWEN_7B)
    home.write(DUAL)
    return home


def models(home: Home, *names: str, keys: str = "") -> None:
    """A profile of tiny models."""
    text = '[gpu]\nheadroom = "64MiB"\n'
    for name in names:
        write_qwen(home.root / f"{name}.gguf", TINY)
        text += f'[service.{name}]\nkind = "llama-server"\nmodel = "{name}.gguf"\n{keys}\n'
    home.write(text)


def planned(home: Home, *arguments: str) -> dict[str, Any]:
    result = home.cli("plan", str(home.profile), "--json", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_two_models_on_a_laptop_card(dual: Home) -> None:
    """All of the one with the higher priority, and of the other what fits beside it."""
    plan = planned(dual, *LAPTOP)
    chat, code = plan["services"]

    assert (chat["service"], chat["gpu_layers"], chat["layers"]) == ("chat", 37, 37)
    assert chat["weights_bytes"] / MIB == pytest.approx(1834.83, abs=0.1)
    assert chat["kv_cache_bytes"] == 144 * MIB
    assert (code["service"], code["layers"]) == ("code", 29)
    assert 18 <= code["gpu_layers"] <= 20
    taken = chat["total_bytes"] + code["total_bytes"]
    assert plan["left_bytes"] == (5800 - 256) * MIB - taken
    assert plan["left_bytes"] >= 0


def test_the_json_is_what_scripts_rely_on(dual: Home) -> None:
    plan = planned(dual, *LAPTOP)

    assert list(plan) == ["device", "fits", "services", "left_bytes"]
    assert plan["device"] == {
        "name": "a card",
        "total_bytes": 6141 * MIB,
        "free_bytes": 5800 * MIB,
        "headroom_bytes": 256 * MIB,
        "ceiling_bytes": 6141 * MIB,
    }
    assert plan["fits"] is True
    for each in plan["services"]:
        assert list(each) == SERVICE_KEYS
        parts = ("weights", "kv_cache", "compute", "overhead")
        assert each["total_bytes"] == sum(each[f"{part}_bytes"] for part in parts)
        assert each["host_bytes"] > 0
        assert each["reason"]
    assert plan["services"][1] | {
        "model": "7b.gguf", "n_cpu_moe": 0, "ctx_size": 8192, "parallel": 1, "kv_unified": False,
        "cache_type_k": "q8_0", "cache_type_v": "q8_0", "batch": 2048, "ubatch": 512,
        "flash_attn": "auto",
    } == plan["services"][1]  # fmt: skip


def test_a_person_gets_a_table_and_a_bar(dual: Home) -> None:
    result = dual.cli("plan", str(dual.profile), *LAPTOP)

    assert (result.returncode, result.stderr) == (0, "")
    head, bar, legend, _, columns, chat, code, _, why_chat, why_code = result.stdout.splitlines()
    assert head == "a card · 6141 MiB · 5800 free"
    assert bar.startswith("█" * 20)
    assert bar.endswith("▒····")
    assert "▒ headroom 256  · other programs 341" in legend
    assert columns.split()[:3] == ["SERVICE", "MODEL", "LAYERS"]
    assert chat.split()[:5] == ["chat", "3b", "37", "of", "37"]
    assert code.split()[0] == "code"
    assert why_chat.startswith("chat: all 37 layers")
    assert why_code.startswith("code: ")


def test_the_card_that_is_there_is_asked(dual: Home, cards: StubCards) -> None:
    cards.write(cards.card(free=4000 * MIB, used=2000 * MIB))

    plan = planned(dual)

    assert plan["device"]["name"] == "NVIDIA GeForce RTX 4050 Laptop GPU"
    assert plan["device"]["free_bytes"] == 4000 * MIB
    assert planned(dual, "--free", "5800")["services"] == planned(dual, *LAPTOP)["services"]
    shown = dual.cli("plan", str(dual.profile), "--free", "3GiB").stdout
    assert shown.startswith("RTX 4050 Laptop GPU · 6141 MiB · 3072 free\n")


def test_a_card_that_is_supposed_is_not_looked_for(dual: Home, cards: StubCards) -> None:
    """Given a driver that hangs, a plan for another card need not wait for it."""
    cards.write(cards.card(), "delay nvmlInitWithFlags 600000")

    assert planned(dual, *LAPTOP)["device"]["name"] == "a card"
    assert cards.calls("nvmlInitWithFlags") == 0


def test_more_memory_never_takes_layers_away(dual: Home) -> None:
    layers = [
        [each["gpu_layers"] for each in planned(dual, "--total", mib)["services"]]
        for mib in ("2000", "4000", "6141", "12GiB")
    ]

    assert layers == sorted(layers)
    assert layers[-1] == [37, 29]


def test_without_a_gpu_everything_is_on_the_cpu_and_that_is_said_once(dual: Home) -> None:
    result = dual.cli("plan", str(dual.profile))

    assert result.returncode == 0
    assert result.stdout.count("no GPU") == 1
    assert result.stdout.startswith("no GPU: the NVIDIA driver is not loaded")
    plan = planned(dual)
    assert (plan["device"], plan["fits"], plan["left_bytes"]) == (None, True, 0)
    assert [each["gpu_layers"] for each in plan["services"]] == [0, 0]
    assert [each["total_bytes"] for each in plan["services"]] == [0, 0]
    assert all(each["host_bytes"] > 1800 * MIB for each in plan["services"])


def test_nothing_is_left_behind(dual: Home) -> None:
    before = sorted(dual.root.iterdir())

    planned(dual, *LAPTOP)

    assert sorted(dual.root.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--total", "much"], 'expected MiB or a size with a unit, as 6141 or 6GiB, got "much"'),
        (["--total", "6GB"], 'got "6GB"'),
        (["--total", "-5"], 'got "-5"'),
        (["--total", "0"], "--total is not above zero"),
        (["--total", "6141", "--free", "0B"], "--free is not above zero"),
        (["--total", "6141", "--free", "7000"], "--free 7000 is more than the card has: 6141 MiB"),
        (["--free", "5800"], "--free is of a card, and there is none: the NVIDIA driver is not"),
        (["--set", "service.chat.ctx_size=lots"], "ctx_size"),
        (["nothing-like-it"], "no such profile"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(
    dual: Home, arguments: list[str], said: str
) -> None:
    is_profile = arguments[0] == "nothing-like-it"
    result = dual.cli("plan", *([] if is_profile else [str(dual.profile)]), *arguments)

    assert (result.returncode, result.stdout) == (2, "")
    error, *_ = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in result.stderr


def test_a_free_of_more_than_the_real_card_has(dual: Home, cards: StubCards) -> None:
    cards.write(cards.card())

    result = dual.cli("plan", str(dual.profile), "--free", "8GiB")

    assert result.returncode == 2
    assert result.stderr.startswith("error: --free 8192 is more than the card has: 6141 MiB\n")


def test_a_plan_that_cannot_work_is_refused_with_the_arithmetic(dual: Home) -> None:
    """Given a number of layers that the profile insists on, no plan makes it smaller."""
    result = dual.cli(
        "plan",
        str(dual.profile),
        "--json",
        *LAPTOP,
        "--set",
        "service.chat.gpu_layers=all",
        "--set",
        "service.code.gpu_layers=all",
    )

    assert result.returncode == 1
    plan = json.loads(result.stdout)
    assert plan["fits"] is False
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: code: ")
    assert "MiB too much" in error
    assert hint.startswith("hint: ")


def test_a_service_without_layers_takes_nothing_of_the_card(dual: Home) -> None:
    chat, code = planned(dual, *LAPTOP, "--set", "service.chat.gpu_layers=0")["services"]
    if chat["service"] != "chat":
        chat, code = code, chat

    assert (chat["gpu_layers"], chat["total_bytes"]) == (0, 0)
    assert code["gpu_layers"] == 29


def test_six_models(home: Home, cards: StubCards) -> None:
    names = ("a", "b", "c", "d", "e", "f")
    models(home, *names, keys="ctx_size = 1024")

    plan = planned(home, "--total", "2000")
    shown = home.cli("plan", str(home.profile), "--total", "2000").stdout

    assert sorted(each["service"] for each in plan["services"]) == list(names)
    assert all(each["gpu_layers"] == 3 for each in plan["services"])
    for name in names:
        assert f"{name}: all 3 layers" in shown


def test_a_broken_model_does_not_keep_the_others_from_being_planned(
    home: Home, cards: StubCards
) -> None:
    models(home, "chat", "code", "rag")
    whole = (home.root / "code.gguf").read_bytes()
    (home.root / "code.gguf").write_bytes(whole[: len(whole) // 2])
    (home.root / "rag.gguf").unlink()

    result = home.cli("plan", str(home.profile), "--total", "6141", "--json")

    assert result.returncode == 1
    assert [each["service"] for each in json.loads(result.stdout)["services"]] == ["chat"]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: code: model file truncated: code.gguf: the header says")
    assert "service.rag.model: no file" in errors[1]
    assert len(errors) == 2


def test_where_every_model_is_missing_there_is_nothing_to_plan(
    home: Home, cards: StubCards
) -> None:
    models(home, "chat", "code")
    (home.root / "chat.gguf").unlink()
    (home.root / "code.gguf").unlink()

    result = home.cli("plan", str(home.profile), "--total", "6141", "--json")

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("error: ") == 2


def test_an_unknown_architecture_gets_an_upper_bound_and_is_told_so(
    home: Home, cards: StubCards
) -> None:
    models(home, "chat")
    write_qwen(home.root / "chat.gguf", TINY, architecture="nobody-knows")

    result = home.cli("plan", str(home.profile), "--total", "6141")

    assert result.returncode == 0
    assert "note: chat: an upper bound: its architecture is not known here" in result.stdout


def test_a_profile_without_models(home: Home, cards: StubCards) -> None:
    home.write(home.command("rag", ["sleep", "1000"]))

    result = home.cli("plan", str(home.profile), "--json")

    assert result.returncode == 0
    assert json.loads(result.stdout)["services"] == []
    assert result.stderr == "test has no models: there is nothing to plan\n"


def test_in_single_mode_one_model_is_planned(dual: Home) -> None:
    one = ("--set", "mode=single")
    result = dual.cli("plan", str(dual.profile), *LAPTOP, *one, "--json")
    other = planned(dual, *LAPTOP, *one, "--set", "active=code")

    assert [each["service"] for each in json.loads(result.stdout)["services"]] == ["chat"]
    assert result.stderr == "single mode: without code; llmsup plan --set active=code\n"
    (code,) = other["services"]
    assert (code["service"], code["gpu_layers"]) == ("code", 29)


def test_what_our_own_services_hold_is_free_for_a_plan(dual: Home, cards: StubCards) -> None:
    """Given a stack that is up, the plan is the one of a start from scratch."""
    cards.write(cards.card(free=300 * MIB, used=5500 * MIB))
    stack = FakeStack(
        service("chat", measured_bytes=2200 * MIB),
        service("code", measured_bytes=3300 * MIB),
        service("old", "stopped", pid=None, measured_bytes=999 * MIB),
    )
    stack.snapshot["daemon"]["profile_path"] = str(dual.profile)
    stack.snapshot["daemon"]["overrides"] = ["service.chat.ctx_size=2048"]

    with serving(dual.paths, stack):
        result = dual.cli("plan", "--json")
        asked = dual.cli("plan", "--free", "5000", "--json")

    assert result.stderr == "demo is up and holds 5500 MiB: planned as if that were free\n"
    plan = json.loads(result.stdout)
    assert plan["device"]["free_bytes"] == 5800 * MIB
    assert plan["services"][0]["ctx_size"] == 2048
    assert asked.stderr == ""
    assert json.loads(asked.stdout)["device"]["free_bytes"] == 5000 * MIB


def test_a_daemon_that_does_not_answer_is_not_needed(dual: Home) -> None:
    dual.paths.create()
    with held(dual.paths.lock):
        plan = planned(dual, *LAPTOP)

    assert plan["fits"] is True


def test_a_terminal_with_nothing_but_ascii(dual: Home) -> None:
    dual.environ["PYTHONIOENCODING"] = "ascii"

    result = dual.cli("plan", str(dual.profile), *LAPTOP)

    assert result.stdout.isascii()
    assert "?" not in result.stdout
    assert result.stdout.splitlines()[1].startswith("####")


def test_verbose_shows_what_the_figures_consist_of(dual: Home) -> None:
    shown = dual.cli("plan", str(dual.profile), *LAPTOP, "-v").stdout

    assert "chat, by estimate" in shown
    assert "driver: context and pools" in shown


def test_what_was_measured_takes_the_place_of_the_estimate(dual: Home, cards: StubCards) -> None:
    cards.write(cards.card(free=5800 * MIB, used=341 * MIB))
    (chat, _) = planned(dual)["services"]
    loaded = load(dual.profile, environ=dual.environ, config_dir=dual.paths.config)
    sizing = Sizing(loaded.profile, dual.environ, Ledger, dual.paths.engines)
    card = Device(0, "GPU-1", NAME, "560.35.03", 6141 * MIB, 5800 * MIB, 341 * MIB)
    options = sizing.demand("chat").asked
    sizes = sizing.demand("chat").price(options).estimate.device
    record = Record(sizes, sizes, sizes.total_bytes + 200 * MIB, time=0.0)
    dual.paths.create()
    ledger.save(dual.paths.ledger, Ledger().learn(sizing.key("chat", options, card), record))

    (measured, _) = planned(dual)["services"]

    assert measured["total_bytes"] == sizes.total_bytes + 200 * MIB
    assert measured["total_bytes"] > chat["total_bytes"]
    shown = dual.cli("plan", str(dual.profile), "-v").stdout
    assert "chat, as measured at a load before" in shown


def test_a_ledger_that_cannot_be_read_is_left_where_the_daemon_has_it(dual: Home) -> None:
    dual.paths.create()
    dual.paths.ledger.write_bytes(b"not a ledger")

    assert dual.cli("plan", str(dual.profile), *LAPTOP).returncode == 0
    assert dual.paths.ledger.read_bytes() == b"not a ledger"


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_no_line_is_cut_or_folded(dual: Home, columns: int) -> None:
    lead, follow = pty.openpty()
    os.set_blocking(lead, False)
    environ = dual.environ | {"TERM": "xterm"}
    environ.pop("COLUMNS")
    subprocess.run(
        ["stty", "cols", str(columns), "rows", "40"], stdin=follow, check=True, timeout=10
    )
    done = subprocess.run(
        [LLMSUP, "plan", str(dual.profile), *LAPTOP],
        env=environ, stdin=follow, stdout=follow, check=False, timeout=60,
    )  # fmt: skip
    shown = os.read(lead, 65536).decode()
    os.close(lead)
    os.close(follow)

    assert done.returncode == 0
    assert "\x1b" not in shown  # NO_COLOR is set
    assert max(map(len, shown.splitlines())) <= columns
