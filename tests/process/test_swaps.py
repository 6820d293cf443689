"""In single mode requests swap models: a real daemon, a real Envoy, stub servers."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmsup.control.client import Client
from tests.cards import StubCards
from tests.home import Home, wait_until
from tests.process.test_card_plan import profile, set_free
from tests.process.test_switch import another, kill_daemon, serves, settled, switch

DWELL_S = 1.5
DWELL = f'min_dwell = "{DWELL_S}s"\n'
EITHER_WAY = pytest.mark.parametrize("way", ["break-first", "auto"])
ROUTES = """
[route."chat-7b"]
services = ["chat", "code"]
[route."code-7b"]
services = ["code", "chat"]
"""
ON_DEMAND = {"start": "on-demand"}


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    set_free(stub, 5900)
    home.environ |= stub.environ
    return stub


def stack(
    home: Home,
    chat: dict[str, Any],
    code: dict[str, Any],
    *,
    model: Path | None = None,
    switch: str = "break-first",
) -> None:
    """chat is the active one; each has a route, in which the other stands in for it.

    `model` is code's, where it is another one.
    """
    gateway = f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n'
    services = {"chat": {"priority": 10, **chat}, "code": code}
    profile(home, services, f'mode = "single"\nswitch = "{switch}"\n{DWELL}{gateway}')
    before, section, after = home.profile.read_text().partition("[service.code]")
    if model is not None:
        after = after.replace(str(home.root / "model.gguf"), str(model))
    home.write(before + section + after + ROUTES)
    home.start()


def client(home: Home) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{home.gateway_port}", timeout=60)


def ask(api: httpx.Client, model: str, *, delay_ms: int = 0, timeout: float = 60) -> httpx.Response:
    headers = {"x-stub": json.dumps({"delay_ms": delay_ms})} if delay_ms else {}
    body = {"model": model}
    return api.post("/v1/chat/completions", json=body, headers=headers, timeout=timeout)


def answered_by(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    headers = answer.headers
    return (
        answer.status_code,
        headers.get("x-llmsup-service"),
        headers.get("x-llmsup-fallback"),
    )


def own(service: str) -> tuple[int, str, str]:
    return 200, service, "false"


def swaps(home: Home) -> list[str]:
    return [each["service"] for each in home.events() if each["event"] == "swap"]


def tenures_s(home: Home) -> list[float]:
    """How long each model had been ready when it was told to leave."""
    found, ready_at = [], {}
    for each in home.events():
        if each["event"] == "state" and each["service"] in {"chat", "code"}:
            if each["state"] == "ready":
                ready_at[each["service"]] = each["at_s"]
            elif each["state"] == "draining":
                found.append(each["at_s"] - ready_at[each["service"]])
    return found


def ready_at_once(home: Home) -> int:
    """The most models that were ready at the same time."""
    ready: set[str] = set()
    most = 0
    for each in home.events():
        if each["event"] == "state" and each["service"] in {"chat", "code"}:
            (ready.add if each["state"] == "ready" else ready.discard)(each["service"])
            most = max(most, len(ready))
    return most


def message(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


@EITHER_WAY
def test_a_request_for_the_other_model_has_it_swapped_in(
    home: Home, cards: StubCards, way: str
) -> None:
    stack(home, {}, ON_DEMAND, switch=way)
    assert home.service("chat")["state"] == "ready"
    assert home.service("code")["why"] == "swapped in by a request"
    with client(home) as api:
        assert answered_by(ask(api, "code-7b")) == own("code")
        assert serves(home) == {"chat": None, "code": "model.gguf"}
        assert home.service("chat")["why"] == "swapped in by a request"
        assert home.cli("status").returncode == 0
        assert api.get("/health").status_code == 200
        assert answered_by(ask(api, "chat-7b")) == own("chat"), "one that says so is enough"
    assert serves(home) == {"chat": "model.gguf", "code": None}
    assert swaps(home) == ["code", "chat"]


def test_many_requests_at_once_are_one_swap_and_as_many_answers(
    home: Home, cards: StubCards
) -> None:
    stack(home, {}, ON_DEMAND)
    limits = httpx.Limits(max_connections=None)
    base = f"http://127.0.0.1:{home.gateway_port}"
    with (
        httpx.Client(base_url=base, timeout=60, limits=limits) as api,
        ThreadPoolExecutor(50) as pool,
    ):
        answers = [it.result() for it in [pool.submit(ask, api, "code") for _ in range(50)]]
    assert {answered_by(each) for each in answers} == {own("code")}
    assert swaps(home) == ["code"]
    assert home.service("code")["generation"] == 1


def test_without_a_model_on_demand_no_request_swaps(home: Home, cards: StubCards) -> None:
    stack(home, {}, {})
    with client(home) as api:
        assert answered_by(ask(api, "code-7b")) == (200, "chat", "true")
        refused = ask(api, "code")
    assert refused.status_code == 503
    assert "code is stopped" in message(refused)
    assert swaps(home) == []


def test_one_that_is_waited_for_is_not_loaded_beside_one_that_is_swapped_in(
    home: Home, cards: StubCards
) -> None:
    """Both are asked for while none is up: the one is active, the other is about to be."""
    stack(home, ON_DEMAND, ON_DEMAND)
    with client(home) as api, ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            asking = [(name, pool.submit(ask, api, f"{name}-7b")) for name in ("code", "chat") * 4]
            for name, each in asking:
                assert answered_by(each.result()) == own(name)
            assert home.cli("stop", "chat", "code").returncode == 0
    assert ready_at_once(home) == 1


@EITHER_WAY
def test_clients_that_alternate_cost_one_swap_per_dwell_time(
    home: Home, cards: StubCards, way: str
) -> None:
    stack(home, ON_DEMAND, ON_DEMAND, switch=way)
    is_over = threading.Event()

    def keep_asking(model: str) -> list[tuple[int, str | None, str | None]]:
        found = []
        with client(home) as api:
            while not is_over.is_set():
                found.append(answered_by(ask(api, model)))
        return found

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, name) for name in ("chat-7b", "code-7b") * 4]
        wait_until(lambda: len(swaps(home)) >= 4, "each has had two turns", 90)
        is_over.set()
        found = [each.result() for each in asking]

    for name, answers in zip(("chat", "code") * 4, found, strict=True):
        assert set(answers) == {own(name)}
        assert len(answers) > 1, "each had a turn, again and again"
    assert swaps(home)[:4] in (["chat", "code"] * 2, ["code", "chat"] * 2)
    assert ready_at_once(home) == (1 if way == "break-first" else 2)
    assert min(tenures_s(home)) >= DWELL_S
    assert not [each for each in home.events() if each["event"] == "death"]


def test_a_stream_of_requests_for_one_keeps_nobody_else_waiting(
    home: Home, cards: StubCards
) -> None:
    """What is in flight when it has to leave is finished."""
    stack(home, ON_DEMAND, ON_DEMAND)
    answers: list[tuple[int, str | None, str | None]] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        with client(home) as api:
            while not is_over.is_set():
                answers.append(answered_by(ask(api, "chat-7b", delay_ms=200)))

    with ThreadPoolExecutor(6) as pool, client(home) as api:
        for _ in range(6):
            pool.submit(keep_asking)
        home.wait_state("chat", "ready")
        assert answered_by(ask(api, "code-7b")) == own("code")
        is_over.set()
    assert set(answers) == {own("chat")}


def test_the_first_request_loads_whichever_is_asked_for(home: Home, cards: StubCards) -> None:
    stack(home, ON_DEMAND, ON_DEMAND)
    assert {each: home.service(each)["state"] for each in ("chat", "code")} == {
        "chat": "stopped",
        "code": "stopped",
    }
    with client(home) as api:
        assert answered_by(ask(api, "code-7b")) == own("code")
    assert home.service("chat")["generation"] == 0


@pytest.mark.parametrize(
    ("way", "serves_still"),
    [
        ("break-first", "chat (model.gguf) serves again"),
        ("auto", "chat (model.gguf) serves as before"),
    ],
)
def test_a_swap_that_fails_is_told_and_not_tried_again_at_once(
    home: Home, cards: StubCards, way: str, serves_still: str
) -> None:
    stack(home, {}, ON_DEMAND, model=another(home, "dies"), switch=way)
    with client(home) as api, ThreadPoolExecutor(4) as pool:
        told = [it.result() for it in [pool.submit(ask, api, "code") for _ in range(4)]]
        for answer in told:
            assert answer.status_code == 503
            assert "code was not switched to dies.gguf: " in message(answer)
            assert serves_still in message(answer)
            assert int(answer.headers["retry-after"]) > 0
        assert ask(api, "code").status_code == 503
        assert swaps(home) == ["code"]
        assert serves_still in home.service("code")["why"]
        settled(home)
        assert answered_by(ask(api, "code-7b")) == (200, "chat", "true"), "a fallback is for this"
        assert answered_by(ask(api, "chat-7b")) == own("chat")
        wait_until(lambda: home.service("code")["why"] == "swapped in by a request", "another try")
        assert ask(api, "code").status_code == 503
        assert swaps(home) == ["code", "code"]
        # The operator is not held off, and what he brings about ends the setback.
        assert switch(home, "code", another(home, "works"))["success"]
        assert answered_by(ask(api, "chat-7b")) == own("chat")
        assert answered_by(ask(api, "code")) == own("code")
        assert serves(home) == {"chat": None, "code": "works.gguf"}, "the model that was chosen"


def test_a_new_server_that_is_killed_gives_way_to_the_one_before(
    home: Home, cards: StubCards
) -> None:
    stack(home, {}, {"env": {"LOADS_S": "1"}, **ON_DEMAND})
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, api, "code")
        wait_until(lambda: home.service("code")["pid"] is not None, "code loads")
        os.kill(home.service("code")["pid"], signal.SIGKILL)
        assert "serves again" in message(asking.result(60))
        assert answered_by(ask(api, "chat-7b")) == own("chat")
        wait_until(lambda: not home.service("code")["why"].endswith("again"), "another try")
        assert answered_by(ask(api, "code")) == own("code")


@EITHER_WAY
@pytest.mark.parametrize("chat", [{}, ON_DEMAND], ids=["always", "on-demand"])
def test_a_daemon_killed_in_the_middle_leaves_the_model_before(
    home: Home, cards: StubCards, chat: dict[str, Any], way: str
) -> None:
    stack(home, chat, {"env": {"LOADS_S": "1"}, **ON_DEMAND}, switch=way)
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        assert answered_by(ask(api, "chat-7b")) == own("chat")
        asking = pool.submit(ask, api, "code-7b")
        wait_until(lambda: home.service("code")["pid"] is not None, "code loads")
        kill_daemon(home)
        assert asking.result(60).status_code == 503
        home.start()
        home.wait_state("chat", "ready")
        wait_until(lambda: serves(home) == {"chat": "model.gguf", "code": None}, "chat alone")
        assert answered_by(ask(api, "code-7b")) == own("code")
        pid = home.service("code")["pid"]
        kill_daemon(home)
        home.start()
        assert home.wait_state("code", "ready")["pid"] == pid, "what was swapped in stays"
        assert home.service("chat")["state"] == "stopped"


def test_an_envoy_killed_in_the_middle_does_not_disturb_a_swap(
    home: Home, cards: StubCards
) -> None:
    stack(home, {}, {"env": {"LOADS_S": "1"}, **ON_DEMAND})
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, api, "code-7b")
        wait_until(lambda: home.service("code")["pid"] is not None, "code loads")
        os.kill(home.service("gateway")["pid"], signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            asking.result(60)
        home.wait_state("code", "ready")
        home.wait_state("gateway", "ready")
        assert answered_by(ask(api, "code-7b")) == own("code")


def test_a_client_that_leaves_before_its_turn_swaps_nothing(home: Home, cards: StubCards) -> None:
    stack(home, ON_DEMAND, ON_DEMAND)
    with client(home) as api:
        assert answered_by(ask(api, "chat-7b")) == own("chat")
        with pytest.raises(httpx.ReadTimeout):
            ask(api, "code-7b", timeout=0.3)
        time.sleep(DWELL_S)
        assert answered_by(ask(api, "chat-7b")) == own("chat")
    assert swaps(home) == []


def test_who_waits_for_a_turn_longer_than_allowed_is_refused(home: Home, cards: StubCards) -> None:
    stack(home, ON_DEMAND, ON_DEMAND)
    home.profile.write_text(
        home.profile.read_text()
        .replace("[gateway]", '[gateway]\nhold_timeout = "4s"')
        .replace(f'min_dwell = "{DWELL_S}s"', 'min_dwell = "1h"')
    )
    assert home.cli("reload").returncode == 0
    with client(home) as api:
        assert answered_by(ask(api, "chat-7b")) == own("chat")
        refused = ask(api, "code-7b")
    assert refused.status_code == 503
    assert "not ready within 4s" in message(refused)
    assert int(refused.headers["retry-after"]) > 0


def test_one_that_is_idle_is_unloaded_and_either_comes_back(home: Home, cards: StubCards) -> None:
    stack(home, {"ttl": "600ms", **ON_DEMAND}, {"ttl": "600ms"})
    with client(home) as api:
        for name in ("chat", "code", "chat"):
            assert answered_by(ask(api, f"{name}-7b")) == own(name)
            why = home.wait_state(name, "stopped")["why"]
            assert why == "unloaded after 600ms without a request; the next request loads it"
            assert home.cli("status").returncode == 0
            assert answered_by(ask(api, f"{name}-7b")) == own(name)
            home.wait_state(name, "stopped")


def test_one_that_is_swapped_in_later_is_unloaded_when_it_is_idle(
    home: Home, cards: StubCards
) -> None:
    """Given a daemon that found nothing to watch when it began."""
    stack(home, {}, {"ttl": "600ms", **ON_DEMAND})
    with client(home) as api:
        assert answered_by(ask(api, "code-7b")) == own("code")
        why = home.wait_state("code", "stopped")["why"]
        assert why == "unloaded after 600ms without a request; the next request loads it"


def test_what_gave_way_in_use_is_not_told_to_be_idle(home: Home, cards: StubCards) -> None:
    stack(home, {"ttl": "2s"}, {**ON_DEMAND, "ttl": "600ms"})
    with client(home) as api:
        wait_until(lambda: answered_by(ask(api, "chat")) == own("chat"), "chat is used")
        for _ in range(20):  # it is seen to be
            ask(api, "chat", delay_ms=50)
        assert answered_by(ask(api, "code-7b")) == own("code")
        for _ in range(25):
            assert answered_by(ask(api, "code-7b", delay_ms=100)) == own("code")
    unloaded = [each["service"] for each in home.events() if each["event"] == "unloaded"]
    assert unloaded == []
    assert home.service("chat")["why"] == "swapped in by a request"


def test_the_other_waits_for_one_that_finishes_what_it_answers(
    home: Home, cards: StubCards
) -> None:
    """Given a card with room for one of them."""
    set_free(cards, 2000)
    stack(home, {"gpu_layers": "all"}, {"gpu_layers": "all", **ON_DEMAND})
    with client(home) as api, ThreadPoolExecutor(1) as pool:
        last = pool.submit(ask, api, "chat", delay_ms=800)
        wait_until(lambda: is_asked(home, "chat"), "the request is being answered")
        Client(home.paths).stop(["chat"])
        assert answered_by(ask(api, "code-7b")) == own("code")
        assert answered_by(last.result(60)) == own("chat")
    assert swaps(home) == ["code"]


def is_asked(home: Home, name: str) -> bool:
    told = httpx.get(f"http://127.0.0.1:{home.service(name)['port']}/stub").text
    return "/v1/chat/completions" in told


def test_a_stop_leaves_room_for_the_other(home: Home, cards: StubCards) -> None:
    """One that does not start on demand stays stopped; the other is swapped in at once."""
    stack(home, {}, ON_DEMAND)
    assert home.cli("stop", "chat").returncode == 0
    with client(home) as api:
        refused = ask(api, "chat")
        assert refused.status_code == 503
        assert "chat is stopped (stopped on request)" in message(refused)
        assert answered_by(ask(api, "code-7b")) == own("code")
        assert answered_by(ask(api, "chat")) == own("chat")


def test_one_that_is_loaded_with_an_admin_key_takes_the_place_of_the_other(
    home: Home, cards: StubCards
) -> None:
    keys = home.root / "admin-keys.txt"
    keys.write_text("sk-admin\n")
    keys.chmod(0o600)
    stack(home, {}, {})
    assert home.cli("stop").returncode == 0
    home.start("--set", "gateway.admin_keys_file=admin-keys.txt")
    with client(home) as api:
        headers = {"authorization": "Bearer sk-admin"}
        answer = api.post("/models/load", json={"model": "code"}, headers=headers)
        assert answer.json() == {"success": True}
        assert answered_by(ask(api, "code")) == own("code")
    wait_until(lambda: serves(home) == {"chat": None, "code": "model.gguf"}, "code alone")


@pytest.mark.parametrize("verb", ["start", "restart"])
def test_one_that_an_operator_wants_up_takes_the_place_of_the_other(
    home: Home, cards: StubCards, verb: str
) -> None:
    stack(home, {}, {})
    told = getattr(Client(home.paths), verb)(["code"])
    assert told["changed"] == ["code"]
    wait_until(lambda: serves(home) == {"chat": None, "code": "model.gguf"}, "code alone")


def test_a_profile_may_say_nothing_else_by_a_flag(home: Home, cards: StubCards) -> None:
    stack(home, {}, ON_DEMAND)
    assert home.cli("stop").returncode == 0
    home.start("--set", "active=chat")
    with client(home) as api:
        refused = ask(api, "code")
    assert refused.status_code == 503
    assert "--set says what active is" in message(refused)
    assert Client(home.paths).status()["daemon"]["mode"] == "single"
