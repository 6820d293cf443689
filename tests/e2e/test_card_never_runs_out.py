"""Real models on a card that is too small for them: every start ends well, whatever is free."""

import json
import os
from dataclasses import dataclass
from random import Random

import pytest

from llmsup.drill.traffic import chat_body
from tests.e2e.small_card import (
    HEADROOM_MIB,
    LONG,
    MIB,
    OTHERS_MIB,
    SERVICES,
    TOTAL_MIB,
    ask,
    deaths,
    profile,
)
from tests.home import Home, wait_until
from tests.standin import StandIn

CAPS = int(os.environ.get("LLMSUP_CARD_CAPS", "6"))
"""`make card` tries thirty."""

ROUTES = ("chat-3b", "code-7b")
ERROR_MAX_MIB = 16


@dataclass(frozen=True, order=True)
class Row:
    """What one service had of a card with so much free. MiB."""

    cap: int
    service: str
    layers: int
    planned: float
    measured: float
    used: float


@pytest.mark.timeout(120 + 20 * CAPS)
def test_every_start_is_ready_and_answers_whatever_is_free(
    on_card: Home, small_card: StandIn
) -> None:
    """Given caps from "nothing fits" to "all fits", in any order, under one daemon."""
    profile(on_card, "off")
    small_card.take(OTHERS_MIB)
    on_card.start(timeout_s=120)
    assert len(deaths(on_card)) <= len(SERVICES), "one retry each, before it was measured"

    caps = [round(20 + each * (TOTAL_MIB - 40) / (CAPS - 1)) for each in range(CAPS)]
    Random(CAPS).shuffle(caps)
    rows: list[Row] = []
    for cap in caps:
        seen = len(on_card.events())
        assert on_card.cli("stop", *SERVICES).returncode == 0
        wait_until(lambda: knows_what_is_free(on_card, small_card), "it is back", pause_s=0.1)
        small_card.give_back()
        small_card.take(TOTAL_MIB - cap)
        started = on_card.cli("start", timeout_s=120)
        assert started.returncode == 0, f"{cap} MiB: {started.stderr}{on_card.daemon_log()}"

        for route in ROUTES:
            record = ask(on_card, chat_body(route, max_tokens=4))
            assert (record.status, record.error) == (200, "")
        assert deaths(on_card, seen) == [], f"{cap} MiB"
        assert small_card.free_mib > min(cap, HEADROOM_MIB) / 2
        rows += [row(on_card, small_card, cap, name) for name in SERVICES]

    print(table(rows))
    given = {(each.cap, each.service): each.layers for each in rows}
    assert [given[min(caps), name] for name in SERVICES] == [0, 0]
    assert [given[max(caps), name] for name in SERVICES] == [31, 19]
    assert len(set(given.values())) > 3, "something in between"
    for each in rows:
        assert abs(each.used - each.planned) <= ERROR_MAX_MIB
        assert (each.layers == 0) == (each.used == 0)


def knows_what_is_free(home: Home, card: StandIn) -> bool:
    """Whether the daemon has seen it."""
    return bool(home.status()["gpu"]["free_bytes"] == round(card.free_mib * MIB))


def row(home: Home, card: StandIn, cap: int, name: str) -> Row:
    """How it stands with the card."""
    info = home.service(name)
    assert info["state"] == "ready"
    planned, measured = ((info[f"{what}_bytes"] or 0) / MIB for what in ("planned", "measured"))
    return Row(cap, name, info["gpu_layers"], planned, measured, card.used_by(info["pid"]))


def table(rows: list[Row]) -> str:
    """The plan beside what the card really lost, in MiB."""
    lines = ["", " cap  service  layers   planned  measured      used     error"]
    for each in sorted(rows):
        sizes = (each.planned, each.measured, each.used, each.planned - each.used)
        figures = "".join(f"{size:10.1f}" for size in sizes)
        lines.append(f"{each.cap:4}  {each.service:7}  {each.layers:6}{figures}")
    return "\n".join(lines)


@pytest.mark.timeout(300)
def test_a_server_that_runs_out_at_run_time_comes_back_smaller(
    on_card: Home, small_card: StandIn
) -> None:
    """Given a card that is full by the time of a prompt that needs more than any before."""
    profile(on_card, "off")
    on_card.start(timeout_s=120)
    chat = on_card.service("chat")
    assert chat["gpu_layers"] == 31
    small_card.take(int(small_card.free_mib))
    small_card.need(32)

    record = ask(on_card, chat_body("chat-3b", max_tokens=4, text=LONG))
    assert (record.status, record.service) == (200, "code")
    again = on_card.wait_replaced(chat, deadline_s=120)
    assert again["gpu_layers"] < 31
    died = deaths(on_card)
    # The other one's prompt needs more, too: chat may have to give way twice.
    assert {(each["service"], each["cause"]) for each in died} == {("chat", "out of GPU memory")}
    why = on_card.cli("why", "chat").stdout
    assert "out of GPU memory" in why
    assert f" → {again['gpu_layers']} layers" in json.dumps(on_card.events(), ensure_ascii=False)
    record = ask(on_card, chat_body("chat-3b", max_tokens=4, text=LONG))
    assert (record.status, record.service) == (200, "chat")
