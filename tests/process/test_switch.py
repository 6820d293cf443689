"""Switching models under a real daemon and a real Envoy; stub servers really take memory."""

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.drill.traffic import Load, Record, chat_body
from llmsup.errors import LlmsupError, UsageError
from llmsup.host.leftovers import home_mark
from llmsup.host.process import Found, find
from tests.cards import StubCards
from tests.gguf_files import SMALL, Entry, write_sparse
from tests.home import LLMSUP, Home, is_alive, wait_until
from tests.process.test_card_plan import profile, set_free
from tests.process.test_stack import ask

CHAT = '[route."chat-7b"]\nservices = ["chat", "code"]\n'
CODE = '[route."code-7b"]\nservices = ["code", "chat"]\n'


@pytest.fixture
def cards(home: Home, tmp_path: Path) -> StubCards:
    stub = StubCards(tmp_path)
    set_free(stub, 5900)
    home.environ |= stub.environ
    return stub


def another(home: Home, name: str, layers: int = 20) -> Path:
    """A model file like that of the profile, by another name."""
    tensors: list[Entry] = [("token_embd.weight", (4096, 100), 0)]
    tensors += [(f"blk.{layer}.ffn_up.weight", (4096, 4096), 0) for layer in range(layers)]
    tensors.append(("output.weight", (4096, 100), 0))
    metadata = {
        **SMALL,
        "llama.block_count": ("u32", layers),
        "llama.embedding_length": ("u32", 4096),
        "llama.feed_forward_length": ("u32", 4096),
        "llama.attention.head_count": ("u32", 32),
        "llama.attention.head_count_kv": ("u32", 2),
    }
    return write_sparse(home.root / f"{name}.gguf", metadata, tensors)


def stack(
    home: Home,
    *,
    mode: str = "dual",
    switch: str = "break-first",
    drain_timeout: str = "1s",
    **keys: Any,
) -> None:
    """chat and code, which stand in for each other, with one model."""
    services = {"chat": {"priority": 10, **keys}, "code": dict(keys)}
    gateway = f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n'
    profile(home, services, f'mode = "{mode}"\nswitch = "{switch}"\n{gateway}')
    text = home.profile.read_text().replace('"1s"', f'"{drain_timeout}"')
    if switch == "auto":
        text = re.sub(r"(?m)^port = .*\n", "", text)
    home.write(text + CHAT + CODE)
    home.start()


def switch(home: Home, target: str = "chat", model: Path | None = None) -> SwitchResult:
    return Client(home.paths).switch(target, None if model is None else str(model))


def serves(home: Home) -> dict[str, str | None]:
    return {each["service"]: each["model"] for each in Client(home.paths).models()}


def settled(home: Home) -> None:
    wait_until(
        lambda: all(row["confirmed"] == row["desired"] for row in home.upstreams()), "the lists"
    )


def under_load(home: Home, act: Callable[[], object], clients: int = 8) -> list[Record]:
    """What clients of chat's route got before, while and after `act`."""

    async def run() -> list[Record]:
        load = Load(home.gateway_port, chat_body("chat-7b"), clients=clients, pause_s=0.01)
        load.start()
        try:
            await asyncio.to_thread(act)
            answered = len(load.records)
            while len(load.records) < answered + 30:
                await asyncio.sleep(0.01)
        finally:
            await load.finish()
        return load.records

    return asyncio.run(run())


def answered_by(record: Record) -> str:
    """The model file of the server that answered."""
    return Path(json.loads(record.body)["stub"]["model"]).name


def expect_whole(home: Home, model: str) -> None:
    """chat serves the model, nothing is left half-way, and a next switch works."""
    home.wait_state("chat", "ready")
    wait_until(lambda: serves(home)["chat"] == model, f"{model}: {serves(home)}")
    settled(home)
    assert ask(home)[1]["x-llmsup-service"] == "chat"
    choices = home.paths.choices
    assert not choices.exists() or '"unfinished":{"' not in choices.read_text()
    after = switch(home, model=another(home, "next"))
    assert (after["success"], after["current_model"]) == (True, "next.gguf"), after
    assert serves(home)["chat"] == "next.gguf"


# --- dual mode


def test_a_switch_loses_no_request_and_shows_no_model_before_it_has_proved_itself(
    home: Home, cards: StubCards
) -> None:
    stack(home, env={"LOADS_S": "0.4"})
    seen: list[SwitchProgress] = []

    def act() -> None:
        client = Client(home.paths)
        results.append(client.switch("chat", str(another(home, "b")), seen.append))

    results: list[SwitchResult] = []
    records = under_load(home, act)

    assert [record.error for record in records if record.failed] == []
    own = [answered_by(record) for record in records if not record.is_fallback]
    assert own == sorted(own, reverse=True), "model.gguf, and from one moment on b.gguf"
    assert {*own} == {"model.gguf", "b.gguf"}
    assert {record.service for record in records if record.is_fallback} == {"code"}
    (result,) = results
    assert result["success"], result
    assert result["message"] == "chat serves b.gguf now"
    assert (result["service"], result["current_model"]) == ("chat", "b.gguf")
    phases = list(dict.fromkeys(each["phase"] for each in seen))
    assert "loading" in phases, "the others may be too short to be seen"
    order = ["checking", "leaving", "loading", "verifying", "switched"]
    assert phases == [phase for phase in order if phase in phases]
    assert home.service("chat")["model"] == "b.gguf"
    assert home.service("chat")["restarts"] == 0
    assert [e["why"] for e in home.events() if e["event"] == "switch"] == [result["message"]]


def test_what_serves_already_is_said_at_once(home: Home, cards: StubCards) -> None:
    stack(home)
    before = home.service("chat")
    result = switch(home)
    assert (result["success"], result["message"]) == (True, "chat serves model.gguf already")
    assert result["current_model"] == "model.gguf"
    assert home.service("chat")["pid"] == before["pid"]


def test_without_a_file_it_goes_back_to_the_profile_as_it_is_now(
    home: Home, cards: StubCards
) -> None:
    stack(home)
    assert switch(home, model=another(home, "b"))["success"]
    other = another(home, "c")
    text = home.profile.read_text().replace(str(home.root / "model.gguf"), str(other), 1)
    home.profile.write_text(text)
    result = switch(home)
    assert result["message"] == "chat serves c.gguf now"
    assert serves(home) == {"chat": "c.gguf", "code": "model.gguf"}


def test_the_choice_outlives_the_daemon_a_reload_and_the_stack(
    home: Home, cards: StubCards
) -> None:
    stack(home)
    assert switch(home, model=another(home, "b"))["success"]
    pid = home.service("chat")["pid"]
    assert home.cli("restart", "--daemon").returncode == 0
    assert home.cli("reload").returncode == 0
    kill_daemon(home)
    home.start()
    assert home.wait_state("chat", "ready")["pid"] == pid, "nobody touched it"
    assert home.service("chat")["model"] == "b.gguf"

    assert home.cli("stop").returncode == 0
    home.paths.memory.unlink(missing_ok=True)  # as after a reboot
    home.start()
    assert serves(home) == {"chat": "b.gguf", "code": "model.gguf"}
    planned = json.loads(home.cli("plan", "--json", str(home.profile)).stdout)
    assert {each["service"]: each["model"] for each in planned["services"]}["chat"] == "b.gguf"

    (home.root / "b.gguf").unlink()
    assert home.cli("stop").returncode == 0
    home.start()
    assert serves(home)["chat"] == "model.gguf", "the file has gone: what the profile says"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dies", "exited with status 1"),
        ("other", "it serves /somewhere/else.gguf"),
        ("broken", "500"),
    ],
)
def test_a_model_that_does_not_serve_gives_way_to_the_one_before(
    home: Home, cards: StubCards, name: str, reason: str
) -> None:
    stack(home)
    results: list[SwitchResult] = []
    records = under_load(home, lambda: results.append(switch(home, model=another(home, name))))

    assert [record.error for record in records if record.failed] == []
    assert {answered_by(record) for record in records} == {"model.gguf"}
    (result,) = results
    assert not result["success"]
    assert result["message"].startswith(f"chat was not switched to {name}.gguf: ")
    assert reason in result["message"]
    assert result["message"].endswith("; chat (model.gguf) serves again")
    assert (result["service"], result["current_model"]) == ("chat", "model.gguf")
    expect_whole(home, "model.gguf")


def test_what_cannot_work_is_refused_and_changes_nothing(home: Home, cards: StubCards) -> None:
    stack(home, gpu_layers="all")
    before = {name: home.service(name)["pid"] for name in ("chat", "code")}
    short = another(home, "short")
    os.truncate(short, short.stat().st_size // 2)
    large = another(home, "large", layers=120)
    noise = home.root / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(100))

    for file, words in ((short, "truncated"), (large, "MiB"), (noise, "model file")):
        result = switch(home, model=file)
        assert not result["success"]
        assert words in result["message"], result
        assert result["message"].endswith("nothing was changed, chat (model.gguf) serves as before")
    for target, model in (("chat", "missing.gguf"), ("chat", str(home.root)), ("nobody", None)):
        with pytest.raises(UsageError):
            Client(home.paths).switch(target, model)
    assert {name: home.service(name)["pid"] for name in before} == before
    expect_whole(home, "model.gguf")


def test_what_runs_out_of_memory_gets_a_smaller_plan_and_serves(
    home: Home, cards: StubCards
) -> None:
    stack(home, env={"RUNS_OUT_ABOVE": "15", "MISSES_MIB": "400"})
    result = switch(home, model=another(home, "b"))
    assert result["success"], result
    assert 0 <= home.service("chat")["gpu_layers"] <= 15


def test_what_flags_say_is_not_switched(home: Home, cards: StubCards) -> None:
    profile(home, {"chat": {}})
    home.start("--set", f"service.chat.model={home.root / 'model.gguf'}")
    with pytest.raises(UsageError, match=r"--set says what service\.chat\.model is"):
        switch(home, model=another(home, "b"))


def test_one_switch_at_a_time(home: Home, cards: StubCards) -> None:
    stack(home, env={"LOADS_S": "1"})
    model = another(home, "b")
    first = threading.Thread(target=switch, args=(home, "chat", model))
    first.start()
    wait_until(lambda: home.service("chat")["state"] == "starting", "the switch")
    with pytest.raises(LlmsupError, match=r"chat is being switched to b\.gguf"):
        switch(home, "code", model)
    with pytest.raises(LlmsupError, match="being switched"):
        Client(home.paths).reload()
    first.join()
    assert serves(home) == {"chat": "b.gguf", "code": "model.gguf"}


def test_a_stop_has_the_last_word(home: Home, cards: StubCards) -> None:
    stack(home, env={"LOADS_S": "1"})
    results: list[SwitchResult] = []
    model = another(home, "b")
    thread = threading.Thread(target=lambda: results.append(switch(home, model=model)))
    thread.start()
    wait_until(lambda: home.service("chat")["state"] == "starting", "the switch")
    Client(home.paths).stop(["chat"])
    thread.join()
    assert results[0]["message"] == "chat was stopped while it was switched to b.gguf"
    home.wait_state("chat", "stopped")
    Client(home.paths).start(["chat"])
    expect_whole(home, "model.gguf")


def test_a_stop_has_the_last_word_before_anything_is_done_too(home: Home, cards: StubCards) -> None:
    """Given a card that another load is not done with: so long the switch only looks."""
    stack(home, env={"LOADS_S": "1.5"})
    model, results = another(home, "b"), list[SwitchResult]()
    Client(home.paths).restart(["code"])
    home.wait_state("code", "starting")
    thread = threading.Thread(target=lambda: results.append(switch(home, model=model)))
    thread.start()
    wait_until(lambda: refuses_another(home), "the switch")
    Client(home.paths).stop(["chat"])
    thread.join()
    assert results[0]["message"] == "chat was stopped while it was switched to b.gguf"
    home.wait_state("chat", "stopped")
    assert len(processes(home, "chat")) == 0
    Client(home.paths).start(["chat"])
    expect_whole(home, "model.gguf")


def refuses_another(home: Home) -> bool:
    try:
        switch(home, "chat", Path("/nowhere.gguf"))
    except LlmsupError as error:
        return "being switched" in error.message
    return False


def test_what_would_wait_for_another_service_is_not_switched(home: Home, cards: StubCards) -> None:
    stack(home)
    depend_on_code(home)
    before = home.service("chat")
    Client(home.paths).stop(["code"])
    home.wait_state("code", "stopped")
    refused = switch(home, model=another(home, "b"))
    assert refused["message"] == (
        "chat was not switched to b.gguf: it would wait for code to be ready; "
        "nothing was changed, chat (model.gguf) serves as before"
    )
    assert home.service("chat")["pid"] == before["pid"]
    Client(home.paths).start(["code"])
    home.wait_state("code", "ready")
    expect_whole(home, "model.gguf")


def depend_on_code(home: Home) -> None:
    text = home.profile.read_text()
    home.write(text.replace("[service.chat]\n", '[service.chat]\ndepends_on = ["code"]\n'))
    assert home.cli("reload").returncode == 0
    home.wait_state("chat", "ready")
    home.wait_state("code", "ready")


# --- kill -9 in the middle


def kill_daemon(home: Home) -> None:
    daemon = home.daemon_pid()
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not is_alive(daemon), "its end")


def begin(home: Home, model: Path) -> subprocess.Popen[str]:
    """A switch that is seen to load."""
    old = home.service("chat")["pid"]
    asking = subprocess.Popen(
        [LLMSUP, "switch", "chat", "--model", str(model)],
        env=home.environ, cwd=home.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: home.service("chat")["pid"] not in {old, None}, "a new process")
    return asking


@pytest.mark.parametrize("phase", ["draining", "loading"])
def test_a_daemon_that_is_killed_leaves_what_ran_before(
    home: Home, cards: StubCards, phase: str
) -> None:
    stack(home, env={"LOADS_S": "0.7"}, drain_timeout="20s")
    model = another(home, "b")
    broken: list[str] = []
    if phase == "draining":
        slow = threading.Thread(target=lambda: ask_slowly(home))
        slow.start()
        wait_until(lambda: stub_is_busy(home), "a request in flight")
        switching = threading.Thread(target=lambda: broken.append(attempt(home, model)))
        switching.start()
        home.wait_state("chat", "draining")
    else:
        asking = begin(home, model)
    kill_daemon(home)
    if phase == "draining":
        switching.join()
        slow.join()
        assert "the daemon" in broken[0]
    else:
        said = asking.communicate(timeout=20)[1]
        assert asking.returncode == 4, said
        assert "the daemon" in said
    home.start()
    expect_whole(home, "model.gguf")


def attempt(home: Home, model: Path) -> str:
    try:
        return switch(home, model=model)["message"]
    except LlmsupError as error:
        return error.message


def stub_is_busy(home: Home) -> bool:
    port = home.service("chat")["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return "requests_processing 1" in answer.read().decode()


def ask_slowly(home: Home) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions",
        data=chat_body("chat-7b"),
        headers={"content-type": "application/json", "x-stub": '{"delay_ms": 3000}'},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        response.read()


def test_a_new_server_that_is_killed_gives_way_to_the_old_one(home: Home, cards: StubCards) -> None:
    stack(home, env={"LOADS_S": "0.7"})
    asking = begin(home, another(home, "b"))
    os.kill(home.service("chat")["pid"], signal.SIGKILL)
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 1
    assert "error: chat was not switched to b.gguf: " in said
    assert "chat (model.gguf) serves again" in said
    assert "hint: " in said
    expect_whole(home, "model.gguf")


def test_an_envoy_that_is_killed_does_not_disturb_a_switch(home: Home, cards: StubCards) -> None:
    stack(home, env={"LOADS_S": "0.7"})
    asking = begin(home, another(home, "b"))
    os.kill(home.service("gateway")["pid"], signal.SIGKILL)
    out, said = asking.communicate(timeout=60)
    assert asking.returncode == 0, said
    assert "current model  b.gguf" in out
    expect_whole(home, "b.gguf")


# --- single mode


def test_single_mode_switches_to_the_other_service(home: Home, cards: StubCards) -> None:
    """Requests that come meanwhile wait for it."""
    stack(home, mode="single", env={"LOADS_S": "0.4"})
    assert home.service("code")["state"] == "stopped"
    results: list[SwitchResult] = []
    records = under_load(home, lambda: results.append(switch(home, "code")), clients=4)

    assert results[0]["message"] == "code serves model.gguf now"
    assert {record.status for record in records} == {200}
    services = [record.service for record in records]
    assert services == sorted(services), "first chat, then code"
    assert (home.service("chat")["state"], home.service("chat")["want"]) == ("stopped", "down")
    assert home.cli("status").returncode == 0

    assert home.cli("stop").returncode == 0
    home.start()
    assert home.service("code")["state"] == "ready"
    assert home.service("chat")["state"] == "stopped"
    assert switch(home, "chat")["success"]
    assert serves(home) == {"chat": "model.gguf", "code": None}
    kill_daemon(home)
    home.start()
    home.wait_state("chat", "ready")
    assert home.service("code")["state"] == "stopped", "it was stopped for chat, by nobody's word"


def test_single_mode_goes_back_where_the_other_does_not_come_up(
    home: Home, cards: StubCards
) -> None:
    stack(home, mode="single")
    result = switch(home, "code", another(home, "dies"))
    assert not result["success"]
    assert result["message"].endswith("; chat (model.gguf) serves again")
    assert (result["service"], result["current_model"]) == ("chat", "model.gguf")
    assert serves(home) == {"chat": "model.gguf", "code": None}
    assert home.service("code")["want"] == "down"
    assert switch(home, "code")["success"]
    assert serves(home) == {"chat": None, "code": "model.gguf"}


def test_single_mode_with_a_daemon_killed_in_the_middle(home: Home, cards: StubCards) -> None:
    stack(home, mode="single", env={"LOADS_S": "1"})
    thread = threading.Thread(target=lambda: said.append(attempt_code(home)))
    said: list[str] = []
    thread.start()
    wait_until(lambda: home.service("code")["pid"] is not None, "code loads")
    kill_daemon(home)
    thread.join()
    assert "daemon" in said[0]
    home.start()
    home.wait_state("chat", "ready")
    wait_until(lambda: serves(home) == {"chat": "model.gguf", "code": None}, "chat alone")
    assert switch(home, "code")["success"]


def attempt_code(home: Home) -> str:
    try:
        return switch(home, "code")["message"]
    except LlmsupError as error:
        return error.message


# --- beside what runs


def stack_with_room(home: Home, *, mode: str = "dual", **keys: Any) -> None:
    """Models of 500 MiB, and ports that llmsup chooses."""
    stack(home, mode=mode, switch="auto", gpu_layers=10, **keys)


def processes(home: Home, name: str) -> list[Found]:
    return [each for each in find(home_mark(home.paths)) if each.service == name]


def begin_beside(home: Home, model: Path, target: str = "chat") -> subprocess.Popen[str]:
    """A switch that is seen to load beside what serves."""
    asking = subprocess.Popen(
        [LLMSUP, "switch", target, "--model", str(model)],
        env=home.environ, cwd=home.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(processes(home, "chat")) == 2, "a process beside the other")
    return asking


def test_where_both_fit_every_request_is_answered_by_the_model_asked_for(
    home: Home, cards: StubCards
) -> None:
    stack_with_room(home, env={"LOADS_S": "0.4"})
    before = home.service("chat")
    seen: list[SwitchProgress] = []
    results: list[SwitchResult] = []

    def act() -> None:
        client = Client(home.paths)
        results.append(client.switch("chat", str(another(home, "b")), seen.append))
        results.append(client.switch("chat", str(another(home, "c")), seen.append))

    records = under_load(home, act)

    assert [record.error for record in records if record.failed] == []
    assert not any(record.is_fallback for record in records)
    own = [answered_by(record) for record in records]
    assert list(dict.fromkeys(own)) == ["model.gguf", "b.gguf", "c.gguf"]
    assert [each["message"] for each in results] == [
        "chat serves b.gguf now",
        "chat serves c.gguf now",
    ]
    phases = dict.fromkeys(each["phase"] for each in seen)
    assert "loading beside" in phases
    assert not {"leaving", "loading"} & phases.keys()
    after = home.service("chat")
    assert after["model"] == "c.gguf"
    assert after["port"] != before["port"]
    assert after["restarts"] == 0
    wait_until(lambda: len(processes(home, "chat")) == 1, "the end of what ran before")
    assert after["gpu_layers"] == 10
    expect_whole(home, "c.gguf")


def test_a_stream_of_the_model_before_is_finished_by_it(home: Home, cards: StubCards) -> None:
    stack_with_room(home, env={"LOADS_S": "0.2"}, drain_timeout="20s")
    slow = threading.Thread(target=lambda: ask_slowly(home))
    slow.start()
    wait_until(lambda: stub_is_busy(home), "a request in flight")
    result = switch(home, model=another(home, "b"))
    assert result["success"], result
    assert slow.is_alive(), "nobody waits for it"
    assert result["switch_time_s"] < 2.5
    slow.join()
    wait_until(lambda: len(processes(home, "chat")) == 1, "the end of what ran before")


def test_the_next_daemon_adopts_what_took_the_place(home: Home, cards: StubCards) -> None:
    stack_with_room(home)
    assert switch(home, model=another(home, "b"))["success"]
    after = home.service("chat")
    wait_until(lambda: len(processes(home, "chat")) == 1, "the end of what ran before")
    assert home.cli("reload").returncode == 0
    kill_daemon(home)
    home.start()
    now = home.wait_state("chat", "ready")
    assert (now["pid"], now["port"]) == (after["pid"], after["port"])
    assert now["restarts"] == 0
    expect_whole(home, "b.gguf")


def test_where_there_is_no_room_beside_it_what_runs_gives_way(home: Home, cards: StubCards) -> None:
    stack_with_room(home)
    set_free(cards, 1750)
    seen: list[SwitchProgress] = []
    result = Client(home.paths).switch("chat", str(another(home, "b")), seen.append)
    assert result["success"], result
    assert not any("beside" in each["phase"] for each in seen)
    assert home.service("chat")["model"] == "b.gguf"


def test_what_runs_out_of_memory_beside_another_has_its_place_at_once(
    home: Home, cards: StubCards
) -> None:
    """The plan said that it fits; the card says that it does not."""
    stack_with_room(home, env={"RUNS_OUT_BESIDE": "2"})
    seen: list[SwitchProgress] = []
    result = Client(home.paths).switch("chat", str(another(home, "b")), seen.append)
    assert result["success"], result
    assert "loading" in {each["phase"] for each in seen}
    expect_whole(home, "b.gguf")


@pytest.mark.parametrize("name", ["dies", "other", "broken"])
def test_what_runs_is_never_touched_where_another_beside_it_does_not_serve(
    home: Home, cards: StubCards, name: str
) -> None:
    stack_with_room(home)
    before = home.service("chat")
    results: list[SwitchResult] = []
    records = under_load(home, lambda: results.append(switch(home, model=another(home, name))))
    assert [record.error for record in records if record.failed] == []
    assert {(answered_by(record), record.is_fallback) for record in records} == {
        ("model.gguf", False)
    }
    assert not results[0]["success"]
    assert results[0]["message"].endswith("; chat (model.gguf) serves as before"), results
    assert home.service("chat") | {"uptime_s": 0} == before | {"uptime_s": 0}
    assert len(processes(home, "chat")) == 1
    expect_whole(home, "model.gguf")


def test_a_stop_ends_both(home: Home, cards: StubCards) -> None:
    stack_with_room(home, env={"LOADS_S": "2"})
    asking = begin_beside(home, another(home, "b"))
    Client(home.paths).stop(["chat"])
    said = asking.communicate(timeout=60)[1]
    assert "chat was stopped while it was switched to b.gguf" in said
    wait_until(lambda: not processes(home, "chat"), "the end of both")
    Client(home.paths).start(["chat"])
    expect_whole(home, "model.gguf")


def test_the_end_of_the_stack_ends_both(home: Home, cards: StubCards) -> None:
    stack_with_room(home, env={"LOADS_S": "2"})
    asking = begin_beside(home, another(home, "b"))
    assert home.cli("stop").returncode == 0
    asking.communicate(timeout=60)
    assert not find(home_mark(home.paths))


def test_what_dies_while_another_loads_beside_it_is_started_again(
    home: Home, cards: StubCards
) -> None:
    stack_with_room(home, env={"LOADS_S": "1"})
    asking = begin_beside(home, another(home, "b"))
    before = home.service("chat")
    assert before["why"] == "b.gguf is loaded beside it, to take its place"
    os.kill(before["pid"], signal.SIGKILL)
    out, said = asking.communicate(timeout=60)
    assert asking.returncode == 0, said
    assert "current model  b.gguf" in out
    wait_until(lambda: len(processes(home, "chat")) == 1, "the end of what ran before")
    expect_whole(home, "b.gguf")


def test_it_takes_the_place_of_one_that_waits_for_another_service(
    home: Home, cards: StubCards
) -> None:
    stack_with_room(home, env={"LOADS_S": "1.5"})
    depend_on_code(home)
    asking = begin_beside(home, another(home, "b"))
    Client(home.paths).stop(["code"])
    home.wait_state("code", "stopped")
    os.kill(home.service("chat")["pid"], signal.SIGKILL)
    home.wait_state("chat", "stopped")
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 0, said
    assert home.service("chat")["state"] == "ready"
    assert len(processes(home, "chat")) == 1
    Client(home.paths).start(["code"])
    home.wait_state("code", "ready")
    expect_whole(home, "b.gguf")


def test_what_is_restarted_again_and_again_meanwhile_is_not_taken_for_the_other(
    home: Home, cards: StubCards
) -> None:
    """Its numbers go on, and none of them is that of the one beside it."""
    stack_with_room(home, env={"LOADS_S": "3"})
    asking = begin_beside(home, another(home, "b"))
    (new,) = {each.pid for each in processes(home, "chat")} - {home.service("chat")["pid"]}
    for _ in range(3):
        last = home.service("chat")["generation"]
        Client(home.paths).restart(["chat"], now=True)
        wait_until(partial(is_later, home, last), "the next generation")
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == 0, said
    now = home.wait_state("chat", "ready")
    assert (now["pid"], now["model"]) == (new, "b.gguf")
    wait_until(lambda: len(processes(home, "chat")) == 1, "nothing else")
    expect_whole(home, "b.gguf")


def is_later(home: Home, generation: int) -> bool:
    return int(home.service("chat")["generation"]) > generation


@pytest.mark.parametrize("victim", ["daemon", "new server", "gateway"])
def test_a_kill_while_it_loads_beside_another_leaves_that_one_alone(
    home: Home, cards: StubCards, victim: str
) -> None:
    stack_with_room(home, env={"LOADS_S": "1.5"})
    before = home.service("chat")
    asking = begin_beside(home, another(home, "b"))
    if victim == "daemon":
        kill_daemon(home)
        home.start()
    elif victim == "gateway":
        os.kill(home.service("gateway")["pid"], signal.SIGKILL)
    else:
        (new,) = {each.pid for each in processes(home, "chat")} - {before["pid"]}
        os.kill(new, signal.SIGKILL)
    said = asking.communicate(timeout=60)[1]
    assert asking.returncode == {"daemon": 4, "new server": 1, "gateway": 0}[victim], said
    if victim != "gateway":
        now = home.wait_state("chat", "ready")
        assert (now["pid"], now["restarts"]) == (before["pid"], 0)
    wait_until(lambda: len(processes(home, "chat")) == 1, "one process")
    expect_whole(home, "b.gguf" if victim == "gateway" else "model.gguf")


def test_single_mode_has_both_up_until_the_other_has_proved_itself(
    home: Home, cards: StubCards
) -> None:
    stack_with_room(home, mode="single", env={"LOADS_S": "0.4"})
    results: list[SwitchResult] = []
    records = under_load(home, lambda: results.append(switch(home, "code")), clients=4)
    assert results[0]["message"] == "code serves model.gguf now"
    assert {record.status for record in records} == {200}
    services = [record.service for record in records]
    assert services == sorted(services), "first chat, then code"
    home.wait_state("chat", "stopped")
    failed = switch(home, "chat", another(home, "dies"))
    assert failed["message"].endswith("; code (model.gguf) serves as before"), failed
    home.wait_state("chat", "stopped")
    assert home.service("code")["state"] == "ready"
    assert switch(home, "chat")["success"]
    home.wait_state("code", "stopped")
    kill_daemon(home)
    home.start()
    home.wait_state("chat", "ready")
    assert home.service("code")["state"] == "stopped"
