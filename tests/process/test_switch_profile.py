"""Switching to another profile under a real daemon and a real Envoy; stubs really take memory."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.errors import LlmsupError, UsageError
from tests.cards import StubCards
from tests.home import LLMSUP, STUBS, Home, free_ports, is_alive, wait_until
from tests.process.test_adoption import pids
from tests.process.test_card_plan import model, set_free
from tests.process.test_stack import ask
from tests.process.test_switch import another, answered_by, kill_daemon, serves, under_load


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    set_free(stub, 5900)
    home.environ |= stub.environ
    return stub


class Pair:
    """The profiles `test`, which is started, and `work`: they share chat's route and embedding."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.ports = dict(zip(("chat", "code", "vision"), free_ports(3), strict=True))
        self.binary = home.root / "llama-server"
        program = STUBS / "card_server.py"
        self.binary.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
        self.binary.chmod(0o755)
        self.work = home.paths.profiles / "work.toml"
        self.work.parent.mkdir(parents=True, exist_ok=True)

    def start(self, **env: str) -> None:
        """With `test`; chat and code of it have `env`."""
        services: dict[str, dict[str, Any]] = {"chat": {"env": env}, "embedding": {}, "code": {}}
        self.write(self.home.profile, services)
        self.home.start()

    def write(self, path: Path, services: dict[str, dict[str, Any]], text: str = "") -> None:
        """A profile of these services; those that are left to it have no port."""
        port = self.home.gateway_port
        text = f'{text}\n[gateway]\nlisten = "127.0.0.1:{port}"\nhold_timeout = "60s"\n'
        for name, keys in services.items():
            text += f'[service.{name}]\nkind = "llama-server"\n'
            text += 'drain_timeout = "1s"\nreadiness = { period = "200ms" }\n'
            text += 'restart = { backoff = "100ms" }\n'
            if name in self.ports:
                text += f"port = {self.ports[name]}\n"
            own = {"binary": str(self.binary), "model": str(model(self.home))}
            for key, value in (own | keys).items():
                if isinstance(value, dict):
                    inside = ", ".join(f'{each} = "{words}"' for each, words in value.items())
                    text += f"{key} = {{ {inside} }}\n"
                else:
                    text += f"{key} = {json.dumps(value)}\n"
            text += f'[route."{name}-7b"]\nservices = ["{name}"]\n'
        path.write_text(text)

    def offer(self, **chat: Any) -> None:
        """`work`: another model for chat, no code, and vision instead."""
        chat = {"model": str(another(self.home, "b"))} | chat
        self.write(self.work, {"chat": chat, "embedding": {}, "vision": {}})


@pytest.fixture
def pair(home: Home, cards: StubCards) -> Pair:
    return Pair(home)


def switch(home: Home, target: str = "work") -> SwitchResult:
    return Client(home.paths).switch(target)


def profile_up(home: Home) -> str:
    return str(home.status()["daemon"]["profile"])


def expect_old(home: Home, before: dict[str, int], count: int) -> None:
    """`test` serves with so many processes, nothing is left, and the next switch works."""
    assert profile_up(home) == "test", home.daemon_log()
    for name in ("chat", "embedding", "code"):
        home.wait_state(name, "ready")
    assert serves(home) == dict.fromkeys(("chat", "embedding", "code"), "model.gguf")
    assert pids(home)["embedding"] == before["embedding"], "it is the same in both"
    wait_until(lambda: len(home.processes()) == count, "three servers, Envoy, and nothing else")
    wait_until(lambda: ask(home)[1]["x-llmsup-service"] == "chat", "chat answers")
    assert '"trial":null' in home.paths.choices.read_text()
    pair = Pair(home)
    pair.ports = {name: home.service(name)["port"] for name in ("chat", "code")}
    pair.offer()
    result = switch(home)
    assert result["success"], result
    assert profile_up(home) == "work"


def begin(home: Home, *arguments: str) -> "subprocess.Popen[str]":
    """A switch that is seen to load."""
    asking = subprocess.Popen(
        [LLMSUP, "switch", "work", *arguments],
        env=home.environ, cwd=home.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: loads(home), "work loads")
    return asking


def loads(home: Home) -> bool:
    try:
        status = home.status()
    except LlmsupError:
        return False
    chat = next(each for each in status["services"] if each["service"] == "chat")
    is_loading = chat["state"] == "starting" and chat["pid"] is not None and chat["generation"] > 1
    return status["daemon"]["profile"] == "work" and is_loading


def test_only_what_differs_is_touched_and_no_request_is_lost(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "0.4"})
    before = pids(home)
    seen: list[SwitchProgress] = []
    results: list[SwitchResult] = []
    client = Client(home.paths)

    records = under_load(home, lambda: results.append(client.switch("work", None, seen.append)))

    assert [record.error for record in records if record.failed] == []
    models = [answered_by(record) for record in records]
    assert models == sorted(models, reverse=True), "model.gguf, and from one moment on b.gguf"
    assert {*models} == {"model.gguf", "b.gguf"}
    (result,) = results
    assert result["success"], result
    assert result["message"] == "work serves now"
    assert (result["profile"], result["service"]) == ("work", None)
    assert result["current_model"] == "b.gguf"
    after = pids(home)
    assert {name: after[name] for name in ("embedding", "gateway")} == {
        name: before[name] for name in ("embedding", "gateway")
    }
    assert after["chat"] != before["chat"]
    assert serves(home) == {"chat": "b.gguf", "embedding": "model.gguf", "vision": "model.gguf"}
    assert ask(home, "vision-7b")[1]["x-llmsup-service"] == "vision"
    wait_until(lambda: not is_alive(before["code"]), "code has ended")
    assert {each["profile"] for each in seen} == {"work"}
    assert "loading" in [each["phase"] for each in seen]
    assert [e["why"] for e in home.events() if e["event"] == "switch"] == ["work serves now"]
    assert home.service("chat")["restarts"] == 0


FAILURES = [
    ("dies", "chat: exited with status 1"),
    ("broken", "chat: it generates nothing: HTTP status 500"),
]


@pytest.mark.parametrize(("name", "reason"), FAILURES)
def test_a_profile_that_does_not_serve_gives_way_to_the_one_before(
    pair: Pair, home: Home, name: str, reason: str
) -> None:
    pair.start()
    pair.offer(model=str(another(home, name)))
    before, count = pids(home), len(home.processes())
    results: list[SwitchResult] = []

    records = under_load(home, lambda: results.append(switch(home)))

    assert [record.error for record in records if record.failed] == []
    assert {answered_by(record) for record in records} == {"model.gguf"}
    (result,) = results
    assert not result["success"]
    assert result["message"].startswith("test was not switched to work: "), result
    assert reason in result["message"]
    assert result["message"].endswith("; test serves again")
    assert (result["profile"], result["current_model"]) == ("test", "model.gguf")
    expect_old(home, before, count)


def test_a_request_that_waits_is_handed_from_daemon_to_daemon(pair: Pair, home: Home) -> None:
    """Given one that waits already for the only service of its route when the switch begins."""
    pair.start(LOADS_S="2")
    pair.offer(model=dying(home))
    Client(home.paths).restart(["chat"])
    home.wait_state("chat", "starting")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(answered, home)
        result = switch(home)
        assert result["message"].endswith("; test serves again"), result
        assert asking.result(60) == "model.gguf"


def test_what_cannot_work_is_refused_and_changes_nothing(pair: Pair, home: Home) -> None:
    pair.start()
    before, daemon = pids(home), home.status()["daemon"]
    short = another(home, "short")
    os.truncate(short, short.stat().st_size // 2)

    pair.offer(model=str(short))
    result = switch(home)
    assert not result["success"]
    assert "chat: model file truncated" in result["message"], result
    assert result["message"].endswith("; nothing was changed, test serves as before")
    assert (result["profile"], result["current_model"]) == ("test", "model.gguf")

    pair.offer(model=str(another(home, "large", layers=120)), gpu_layers="all")
    assert "MiB" in switch(home)["message"]

    pair.offer(binary="/nowhere/llama-server")
    assert "/nowhere/llama-server" in switch(home)["message"]

    pair.offer(model="missing.gguf")
    failed = home.cli("switch", "work")
    assert (failed.returncode, "missing.gguf" in failed.stderr) == (2, True), failed.stderr
    failed = home.cli("switch", "nobody")
    assert failed.returncode == 2
    assert 'no service or profile "nobody"' in failed.stderr
    assert "chat, embedding, code" in failed.stderr
    assert "work" in failed.stderr
    with pytest.raises(UsageError, match="--model is for a service"):
        Client(home.paths).switch("work", "b.gguf")

    assert pids(home) == before
    assert home.status()["daemon"]["uptime_s"] > daemon["uptime_s"], "the same daemon"
    assert not home.paths.choices.exists()


def test_the_new_profile_has_all_the_room_that_the_old_one_leaves(pair: Pair, home: Home) -> None:
    """Given two models that fill the card, and two others that do, none of them small."""
    env = {"TAKES_MIB": "2500"}
    big = {"gpu_layers": "all", "env": env, "model": str(another(home, "big", layers=36))}
    pair.write(home.profile, {"chat": big, "code": big})
    home.start()
    bigger = big | {"model": str(another(home, "bigger", layers=37))}
    pair.write(pair.work, {"chat": bigger, "vision": bigger})
    result = switch(home)
    assert result["success"], result
    assert serves(home) == {"chat": "bigger.gguf", "vision": "bigger.gguf"}
    assert switch(home, str(home.profile))["success"]
    assert serves(home) == {"chat": "big.gguf", "code": "big.gguf"}


def test_the_choice_outlives_the_stack_until_another_profile_is_started(
    pair: Pair, home: Home
) -> None:
    pair.start()
    pair.offer()
    assert switch(home)["success"]
    pid = home.service("chat")["pid"]
    assert home.cli("reload").returncode == 0
    kill_daemon(home)
    assert home.cli("start").returncode == 0
    assert (profile_up(home), home.service("chat")["pid"]) == ("work", pid), "nobody touched it"
    assert home.cli("stop").returncode == 0

    home.environ["LLMSUP_PROFILE"] = str(home.profile)
    assert home.cli("profile", "path").stdout.strip() == str(pair.work)
    assert home.cli("start").returncode == 0
    assert profile_up(home) == "work"
    failed = home.cli("start", str(home.profile))
    assert f"hint: llmsup stop first, or llmsup switch {home.profile}" in failed.stderr
    assert home.cli("stop").returncode == 0

    home.start()
    assert profile_up(home) == "test", home.daemon_log()
    assert home.cli("stop").returncode == 0
    assert home.cli("start").returncode == 0
    assert profile_up(home) == "test", "whoever names a profile means it"

    assert switch(home)["success"]
    assert home.cli("stop").returncode == 0
    pair.work.unlink()
    assert home.cli("start").returncode == 0
    assert profile_up(home) == "test", "its file has gone"


def test_the_profile_that_is_up_serves_already(pair: Pair, home: Home) -> None:
    pair.start()
    before = pids(home)
    done = home.cli("switch", "./test.toml")
    assert done.returncode == 0, done.stderr
    assert "test serves already" in done.stdout
    assert "current model  model.gguf" in done.stdout
    assert pids(home) == before


def test_flags_are_of_the_profile_that_they_were_given_for(pair: Pair, home: Home) -> None:
    pair.write(home.profile, {"chat": {}})
    home.start("--set", "service.chat.priority=3")
    pair.offer()
    with pytest.raises(UsageError, match=r"test is up with --set service\.chat\.priority=3"):
        switch(home)


def test_one_switch_at_a_time(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "1"})
    asking = begin(home)
    words = "test is being switched to work"
    client = Client(home.paths)
    attempts: list[Callable[[], object]] = [
        lambda: client.switch("embedding"),
        lambda: client.switch(str(home.profile)),
        client.reload,
        client.hand_over,
    ]
    for attempt in attempts:
        with pytest.raises(LlmsupError, match=words):
            attempt()
    out, said = asking.communicate(timeout=60)
    assert asking.returncode == 0, said
    assert "message        work serves now" in out
    assert "work: loading · b.gguf" in said


def test_a_stop_has_the_last_word(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "2"})
    asking = begin(home)
    assert home.cli("stop").returncode == 0
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode in {1, 4}, said
    assert home.processes() == []
    assert home.cli("start").returncode == 0
    assert profile_up(home) == "test", "it was not over"
    assert switch(home)["success"]


def test_a_client_that_is_interrupted_leaves_the_switch_going_on(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "1"})
    asking = begin(home)
    asking.send_signal(signal.SIGINT)
    said = asking.communicate(timeout=60)[1]
    assert "the switch goes on" in said
    wait_until(lambda: [e for e in home.events() if e["event"] == "switch"] != [], "its end")
    assert [e["why"] for e in home.events() if e["event"] == "switch"] == ["work serves now"]
    assert serves(home)["chat"] == "b.gguf"


def test_what_the_operator_had_stopped_is_stopped_after_a_way_back(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(model=str(another(home, "dies")))
    Client(home.paths).stop(["code"])
    home.wait_state("code", "stopped")
    result = switch(home)
    assert result["message"].endswith("test serves again"), result
    assert (home.service("code")["want"], home.service("code")["state"]) == ("down", "stopped")


# --- kill -9 in the middle


def test_a_daemon_that_is_killed_is_followed_by_one_that_goes_back(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "1"})
    before, count = pids(home), len(home.processes())
    asking = begin(home)
    kill_daemon(home)
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 4, said
    assert "the daemon ended before the switch did" in said
    assert home.cli("start").returncode == 0
    wait_until(lambda: any(e["event"] == "switch" for e in home.events()), "the way back")
    (words,) = [e["why"] for e in home.events() if e["event"] == "switch"]
    assert words.startswith("test was not switched to work: the daemon ended")
    assert words.endswith("; test serves again")
    expect_old(home, before, count)


def test_a_killed_daemon_is_not_followed_by_an_answer_of_the_new_model(
    pair: Pair, home: Home
) -> None:
    """Given a new model that has proved itself, while another of the profile has not."""
    pair.start()
    services: dict[str, dict[str, Any]] = {
        "chat": {"model": str(another(home, "b")), "priority": 9},
        "embedding": {},
        "vision": {"env": {"LOADS_S": "20"}},
    }
    pair.write(pair.work, services)
    asking = begin(home)
    wait_until(lambda: answered(home) == "b.gguf", "it has proved itself")
    kill_daemon(home)
    asking.communicate(timeout=60)
    assert asking.returncode == 4
    assert answered(home) == "b.gguf", "what serves goes on"
    assert home.cli("start", "--no-wait").returncode == 0
    home.wait_state("chat", "ready")
    assert answered(home) == "model.gguf"


def answered(home: Home) -> str:
    return Path(ask(home)[0]["stub"]["model"]).name


def test_a_new_server_that_is_killed_gives_way_to_the_old_one(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "1"})
    before, count = pids(home), len(home.processes())
    asking = begin(home)
    os.kill(home.service("chat")["pid"], signal.SIGKILL)
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 1, said
    assert "error: test was not switched to work: chat: " in said
    assert "; test serves again" in said
    assert "hint: " in said
    expect_old(home, before, count)


def test_an_envoy_that_is_killed_does_not_disturb_a_switch(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer(env={"LOADS_S": "1"})
    asking = begin(home)
    os.kill(home.service("gateway")["pid"], signal.SIGKILL)
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 0, said
    wait_until(lambda: answered(home) == "b.gguf", "an answer")


def test_a_profile_that_is_edited_as_it_is_tried_is_no_way_to_lose_the_stack(
    pair: Pair, home: Home
) -> None:
    """Given a new profile that cannot be read any more once the daemon with it starts."""
    pair.start()
    pair.offer()
    before, count = pids(home), len(home.processes())
    text = pair.work.read_text()
    daemon = home.status()["daemon"]
    results: list[SwitchResult] = []
    switching = threading.Thread(target=lambda: results.append(switch(home)))
    switching.start()
    file = home.paths.choices
    wait_until(lambda: file.exists() and '"trial":{' in file.read_text(), "the trial")
    pair.work.write_text("mode = 3")
    switching.join()
    (result,) = results
    assert not result["success"]
    assert home.status()["daemon"]["pid"] == daemon["pid"]
    assert "work.toml" in result["message"], result
    assert result["message"].endswith("; test serves again")
    pair.work.write_text(text)
    expect_old(home, before, count)


# --- other profiles


def test_from_dual_to_single_and_back_only_the_second_model_is_touched(
    pair: Pair, home: Home
) -> None:
    services: dict[str, dict[str, Any]] = {"chat": {"priority": 10}, "code": {}}
    pair.write(home.profile, services)
    home.start()
    pair.write(pair.work, services, 'mode = "single"')
    before = pids(home)
    assert switch(home)["success"]
    assert serves(home) == {"chat": "model.gguf", "code": None}
    wait_until(lambda: not is_alive(before["code"]), "code has ended")
    assert switch(home, str(home.profile))["success"]
    after = pids(home)
    assert serves(home) == {"chat": "model.gguf", "code": "model.gguf"}
    assert (after["chat"], after["gateway"]) == (before["chat"], before["gateway"])


def test_a_service_without_a_model_has_to_come_up_as_well(pair: Pair, home: Home) -> None:
    pair.start()
    pair.offer()
    broken = home.command("rag", ["/nowhere/program"])
    pair.work.write_text(pair.work.read_text() + broken)
    before, count = pids(home), len(home.processes())
    result = switch(home)
    assert result["message"].startswith("test was not switched to work: rag: "), result
    assert "/nowhere/program" in result["message"]
    expect_old(home, before, count)


def test_what_cannot_be_gone_back_to_leaves_the_rest_of_the_new_one(pair: Pair, home: Home) -> None:
    """Given an old profile that is no good any more by then."""
    pair.start()
    pair.write(pair.work, {"chat": {"env": {"LOADS_S": "1"}}, "vision": {"model": dying(home)}})
    asking = begin(home)
    home.profile.write_text("mode = 3")
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 1, said
    assert "vision: exited with status 1; test cannot be brought back (" in said
    assert "work stays as it is" in said
    assert profile_up(home) == "work"
    assert answered(home) == "model.gguf"


def dying(home: Home) -> str:
    return str(another(home, "dies"))
