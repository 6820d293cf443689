"""Services on demand make room for each other on a card that does not exist."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cards import StubCards
from tests.home import Home, wait_until
from tests.process.test_card_plan import profile, set_free
from tests.process.test_swaps import DWELL_S, answered_by, ask, client, message, own, tenures_s
from tests.process.test_switch import kill_daemon

FITS_ONE_MIB = 2500
LARGE = {"gpu_layers": "all", "env": {"TAKES_MIB": "1500"}}
ON_DEMAND = {**LARGE, "start": "on-demand"}


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    set_free(stub, FITS_ONE_MIB)
    home.environ |= stub.environ
    return stub


def stack(home: Home, **services: dict[str, Any]) -> None:
    gateway = f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n'
    profile(home, services, f'min_dwell = "{DWELL_S}s"\n{gateway}')
    home.write(home.profile.read_text().replace('drain_timeout = "1s"', 'drain_timeout = "20s"'))
    home.start()


def states(home: Home, *names: str) -> list[str]:
    return [home.service(name)["state"] for name in names]


def unloaded(home: Home) -> list[tuple[str, str]]:
    return [(e["service"], e["why"]) for e in home.events() if e["event"] == "unloaded"]


def test_one_at_rest_leaves_for_one_that_a_request_loads(home: Home, cards: StubCards) -> None:
    stack(home, chat=ON_DEMAND, code=ON_DEMAND)
    with client(home) as api:
        assert answered_by(ask(api, "chat")) == own("chat")
        assert answered_by(ask(api, "code")) == own("code")
        assert states(home, "chat", "code") == ["stopped", "ready"]
        why = "unloaded to make room for code; the next request loads it"
        assert home.service("chat")["why"] == why
        assert home.cli("status").returncode == 0
        (model,) = [each for each in api.get("/v1/models").json()["data"] if each["id"] == "chat"]
        assert model["status"] == {"value": "sleeping"}
        assert home.cli("restart", "--daemon").returncode == 0
        wait_until(lambda: home.service("gateway")["state"] == "ready", "the gateway is adopted")
        assert home.service("chat")["why"] == why.replace(" for code", "")
        assert answered_by(ask(api, "chat")) == own("chat")
    assert states(home, "chat", "code") == ["ready", "stopped"]
    assert [each["why"] for each in home.events() if each["event"] == "death"] == []


def test_clients_that_alternate_cost_one_load_per_dwell_time(home: Home, cards: StubCards) -> None:
    """Though one of them has the higher priority."""
    stack(home, chat={"priority": 10, **ON_DEMAND}, code=ON_DEMAND)
    is_over = threading.Event()

    def keep_asking(model: str) -> list[tuple[int, str | None, str | None]]:
        found = []
        with client(home) as api:
            while not is_over.is_set():
                found.append(answered_by(ask(api, model)))
        return found

    with ThreadPoolExecutor(4) as pool:
        asking = {name: pool.submit(keep_asking, name) for name in ("chat", "code")}
        wait_until(lambda: len(unloaded(home)) >= 4, "each has left twice", 60)
        is_over.set()
        found = {name: each.result() for name, each in asking.items()}

    for name, answers in found.items():
        assert set(answers) == {own(name)}
    left = [name for name, _ in unloaded(home)]
    assert all(first != second for first, second in pairwise(left))
    assert min(tenures_s(home)) >= DWELL_S


def test_no_more_leave_than_it_takes_and_the_lowest_priority_first(
    home: Home, cards: StubCards
) -> None:
    small = {**ON_DEMAND, "env": {"TAKES_MIB": "1400"}}
    set_free(cards, 5000)
    stack(home, a={"priority": 5, **small}, b=small, c={"priority": 1, **small}, d=ON_DEMAND)
    with client(home) as api:
        for name in ("a", "b", "c", "d"):
            assert answered_by(ask(api, name)) == own(name)
    assert unloaded(home) == [("b", "to make room for d")]
    assert states(home, "a", "b", "c", "d") == ["ready", "stopped", "ready", "ready"]


def test_a_pinned_one_and_one_that_is_always_up_stay(home: Home, cards: StubCards) -> None:
    set_free(cards, 4000)
    stack(home, chat=LARGE, embedding={"pinned": True, **ON_DEMAND}, code=ON_DEMAND)
    with client(home) as api:
        assert answered_by(ask(api, "embedding")) == own("embedding")
        refused = ask(api, "code")
    assert refused.status_code == 503
    assert "MiB" in message(refused)
    assert states(home, "chat", "embedding", "code") == ["ready", "ready", "failed"]
    assert unloaded(home) == []


def test_one_that_answers_is_finished_first_and_not_left_for_a_lower_priority(
    home: Home, cards: StubCards
) -> None:
    stack(home, chat={"priority": 10, **ON_DEMAND}, code=ON_DEMAND)
    with client(home) as api, ThreadPoolExecutor(4) as pool:
        long = pool.submit(ask, api, "chat", delay_ms=4000)
        home.wait_state("chat", "ready")
        waiting = pool.submit(ask, api, "code")
        home.wait_state("code", "starting")
        wait_until(lambda: "waits for room" in home.service("code")["why"], "it waits")
        assert answered_by(long.result()) == own("chat")
        assert unloaded(home) == []
        assert answered_by(waiting.result()) == own("code")

        long = pool.submit(ask, api, "code", delay_ms=4000)
        assert answered_by(ask(api, "chat")) == own("chat"), "for a higher one it is drained"
        assert answered_by(long.result()) == own("code")
    assert [name for name, _ in unloaded(home)] == ["chat", "code"]


def test_a_pinned_one_comes_before_any_priority(home: Home, cards: StubCards) -> None:
    stack(home, chat={"priority": 10, **ON_DEMAND}, embedding={"pinned": True, **ON_DEMAND})
    with client(home) as api, ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, api, "chat", delay_ms=6000)
        home.wait_state("chat", "ready")
        asking = pool.submit(ask, api, "embedding")
        home.wait_state("chat", "draining")
        assert answered_by(long.result()) == own("chat")
        assert answered_by(asking.result()) == own("embedding")


def test_who_stops_waiting_takes_nobodys_place(home: Home, cards: StubCards) -> None:
    stack(home, chat={"priority": 10, **ON_DEMAND}, code=ON_DEMAND)
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, api, "chat", delay_ms=3000)
        home.wait_state("chat", "ready")
        with pytest.raises(httpx.ReadTimeout):
            ask(api, "code", timeout=0.5)
        assert home.cli("stop", "code").returncode == 0
        assert answered_by(long.result()) == own("chat")
        assert answered_by(ask(api, "chat")) == own("chat")
    assert states(home, "chat", "code") == ["ready", "stopped"]
    assert json.dumps(unloaded(home)) == "[]"


# --- faults in the middle


def test_a_daemon_killed_while_one_leaves_is_followed_by_one_that_goes_on(
    home: Home, cards: StubCards
) -> None:
    stack(home, chat=ON_DEMAND, code=ON_DEMAND)
    with client(home) as api, ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, api, "chat", delay_ms=5000)
        home.wait_state("chat", "ready")
        waiting = pool.submit(ask, api, "code")
        home.wait_state("chat", "draining")
        kill_daemon(home)
        assert waiting.result().status_code == 503
        home.start()
        assert home.service("chat")["why"].startswith("unloaded to make room")
        assert answered_by(long.result()) == own("chat")
        assert answered_by(ask(api, "code")) == own("code")
        assert states(home, "chat", "code") == ["stopped", "ready"]
        assert answered_by(ask(api, "chat")) == own("chat")


def test_one_that_is_killed_while_it_leaves_has_left(home: Home, cards: StubCards) -> None:
    stack(home, chat=ON_DEMAND, code=ON_DEMAND)
    with client(home) as api, ThreadPoolExecutor(2) as pool:
        assert answered_by(ask(api, "chat")) == own("chat")
        long = pool.submit(ask, api, "chat", delay_ms=15_000)
        waiting = pool.submit(ask, api, "code")
        os.kill(home.wait_state("chat", "draining")["pid"], signal.SIGKILL)
        assert answered_by(waiting.result()) == own("code")
        assert answered_by(long.result()) == own("chat"), "repeated, once it was loaded again"


def test_one_that_dies_for_whom_another_left_leaves_the_card_to_it(
    home: Home, cards: StubCards
) -> None:
    stack(home, chat=ON_DEMAND, code={**ON_DEMAND, "env": {"TAKES_MIB": "1500", "LOADS_S": "1"}})
    with client(home) as api, ThreadPoolExecutor(2) as pool:
        assert answered_by(ask(api, "chat")) == own("chat")
        waiting = pool.submit(ask, api, "code")
        wait_until(lambda: home.service("code")["pid"] is not None, "code loads")
        again = pool.submit(ask, api, "chat")
        os.kill(home.service("code")["pid"], signal.SIGKILL)
        assert answered_by(waiting.result()) == own("code")
        assert answered_by(again.result()) == own("chat")
