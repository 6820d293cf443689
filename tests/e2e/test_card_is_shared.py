"""A card that other programs use, too: what they take and free fails no request."""

import asyncio
import os
from random import Random

import pytest

from llmsup.drill.traffic import Load, chat_body
from tests.e2e.small_card import (
    OTHERS_MIB,
    SERVICES,
    TOTAL_MIB,
    deaths,
    layers,
    profile,
    wait_measured,
)
from tests.home import Home, wait_until
from tests.standin import StandIn

SEED = int(os.environ.get("LLMSUP_CARD_SEED", "4"))
TAKES_MIB = 500 * TOTAL_MIB // 6141
"""What 500 MiB are on a card of 6 GB."""


@pytest.mark.timeout(300)
def test_a_program_that_takes_memory_at_any_moment_fails_no_request(
    on_card: Home, small_card: StandIn
) -> None:
    """Given one that takes it while a server loads, after that and while all of them serve."""
    profile(on_card, "auto")
    small_card.take(OTHERS_MIB)
    on_card.start(timeout_s=120)
    chance = Random(SEED)

    async def run() -> Load:
        load = loaded(on_card)
        for name in ("code", "chat", "code"):
            restart = asyncio.create_task(asyncio.to_thread(on_card.cli, "restart", name))
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            small_card.take(TAKES_MIB)
            assert (await restart).returncode == 0
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            only_takes(small_card, OTHERS_MIB)
            await asyncio.to_thread(settled, on_card)
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            small_card.take(TAKES_MIB)
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            only_takes(small_card, OTHERS_MIB)
            await asyncio.to_thread(settled, on_card)
        await load.finish()
        return load

    load = asyncio.run(run())
    assert failures(load) == []
    assert len(load.records) > 20


@pytest.mark.timeout(550)
def test_the_last_in_rank_shrinks_and_grows_back_and_no_request_fails(
    on_card: Home, small_card: StandIn
) -> None:
    profile(on_card, "auto")
    small_card.take(OTHERS_MIB)
    on_card.start(timeout_s=120)
    # What somebody takes while a load settles would be counted as the load's.
    wait_measured(on_card, *SERVICES)
    before = layers(on_card)
    assert 0 < before["code"] < 19, "some of it fits"

    def squeeze_and_relieve() -> None:
        small_card.take(int(small_card.free_mib) - 5)
        wait_until(lambda: len(changes(on_card)) == 1, "a service that shrank", deadline_s=90)
        settled(on_card)
        ((name, was, became),) = changes(on_card)
        assert (name, was) == ("code", before["code"]), "the lower priority"
        assert became < was
        assert layers(on_card) == {"chat": before["chat"], "code": became}
        assert "other programs left" in on_card.service("code")["why"]
        assert "other programs left" in on_card.cli("why", "code").stdout

        only_takes(small_card, OTHERS_MIB)
        wait_until(lambda: len(changes(on_card)) == 2, "that it grew again", deadline_s=300)
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


def loaded(home: Home) -> Load:
    """Clients in a closed loop."""
    body = chat_body("code-7b", max_tokens=8)
    load = Load(home.gateway_port, body, clients=3, pause_s=0.1)
    load.start()
    return load


def failures(load: Load) -> list[str]:
    """What went wrong, and when."""
    return [f"{r.sent_at:.1f}: {r.status} {r.error}" for r in load.records if r.failed]


def only_takes(small_card: StandIn, mib: int) -> None:
    """Other programs have so much, and no more."""
    small_card.give_back()
    small_card.take(mib)


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
