"""Prompt caches are kept over a switch; stub servers save and restore their slots, or do not."""

import asyncio
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmsup.control.client import Client
from llmsup.control.wire import SwitchProgress, SwitchResult
from llmsup.core.warmth import TOKENS_MIN, Saved
from llmsup.host import slot_files
from llmsup.host.journal import Journal
from llmsup.troubles import Troubles
from llmsup.warmth import Warmth
from tests.disk import small_disk
from tests.gguf_files import SMALL, write_sparse
from tests.home import STUBS, Home, free_ports, wait_until

WORDS = "the conversation " * 20
LENGTH = len(WORDS)
"""At least so many tokens, since the stub's are bytes."""


def stack(home: Home, *, mode: str = "single", has_ports: bool = True, **keys: object) -> None:
    """chat and code, each with a model of its own; `keys` are chat's."""
    binary = home.root / "llama-server"
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {STUBS / "upstream.py"} "$@"\n')
    binary.chmod(0o755)
    text = f'mode = "{mode}"\n' + ('active = "chat"\n' if mode == "single" else "")
    text += f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n'
    for name, port in zip(("chat", "code"), free_ports(2), strict=True):
        model = write_sparse(home.root / f"{name}.gguf", SMALL)
        text += (
            f'[service.{name}]\nkind = "llama-server"\nbinary = "{binary}"\nmodel = "{model}"\n'
            'gpu_layers = 0\nreadiness = { period = "200ms" }\ndrain_timeout = "10s"\n'
        )
        text += f"port = {port}\n" if has_ports else ""
        if name == "chat":
            text += "".join(f"{key} = {_toml(value)}\n" for key, value in keys.items())
    home.write(text)
    home.start()


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


def talk(home: Home, words: str = WORDS) -> None:
    """One turn with chat; its server is told all of it."""
    body = {"model": "chat", "messages": [{"role": "user", "content": words}]}
    url = f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions"
    answer = httpx.post(url, json=body, timeout=30)
    assert (answer.status_code, answer.headers["x-llmsup-service"]) == (200, "chat")


def switch(home: Home, target: str) -> SwitchResult:
    """Switch, and wait until the other has ended: where both fit, it does so afterwards."""
    result = Client(home.paths).switch(target, None)
    assert result["success"], result
    home.wait_state("code" if target == "chat" else "chat", "stopped")
    return result


def away_and_back(home: Home) -> SwitchResult:
    switch(home, "code")
    return switch(home, "chat")


def held(home: Home) -> int:
    """How many tokens chat's slot holds."""
    port = home.service("chat")["port"]
    return int(httpx.get(f"http://127.0.0.1:{port}/slots").json()[0]["n_prompt_tokens"])


def kept(home: Home) -> list[Path]:
    return sorted(home.paths.slots.iterdir()) if home.paths.slots.exists() else []


def told(home: Home, event: str) -> list[str]:
    return [each["why"] for each in home.events() if each["event"] == event]


def expect_cold(home: Home, result: SwitchResult) -> None:
    """chat serves, had nothing to begin with, nothing is left, and it was no death."""
    assert result["message"] == "chat serves chat.gguf now"
    assert (result["warm_tokens"], kept(home), told(home, "warmed")) == (0, [], [])
    assert held(home) < LENGTH
    assert told(home, "death") == []
    talk(home)


def test_what_gave_way_comes_back_with_its_conversation(home: Home) -> None:
    stack(home)
    talk(home)
    tokens = held(home)

    switch(home, "code")
    (file,) = kept(home)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (home.paths.slots, file)]
    result = switch(home, "chat")

    assert tokens > LENGTH
    assert modes == [0o700, 0o600]
    assert (result["warm_tokens"], held(home), kept(home)) == (tokens, tokens, [])
    words = f"{tokens} tokens of earlier conversations are in its cache"
    assert result["message"] == f"chat serves chat.gguf now; {words}"
    assert told(home, "switch")[-1] == result["message"]
    (saved,), (warmed,) = told(home, "saved"), told(home, "warmed")
    assert saved.startswith(f"{tokens} tokens of earlier conversations are kept for 1h (")
    assert warmed.startswith(f"{tokens} tokens of earlier conversations are in its cache again (")


def test_what_another_takes_the_place_of_comes_back_with_its_conversation(home: Home) -> None:
    """Given room for both, so that each loads beside the other."""
    stack(home, mode="dual", has_ports=False)
    talk(home)
    tokens = held(home)
    client = Client(home.paths)
    phases: list[SwitchProgress] = []

    away = client.switch("chat", str(home.root / "code.gguf"), phases.append)
    wait_until(lambda: told(home, "saved") != [], "what it had is saved once it has no clients")
    back = client.switch("chat", None)

    assert "loading beside" in {each["phase"] for each in phases}
    assert (away["warm_tokens"], back["warm_tokens"], held(home)) == (0, tokens, tokens)
    assert back["message"].endswith(f"; {tokens} tokens of earlier conversations are in its cache")


def test_one_that_dies_of_it_beside_another_is_loaded_in_its_place(home: Home) -> None:
    stack(home, mode="dual", has_ports=False, env={"SLOTS": "dies"})
    talk(home)
    client = Client(home.paths)
    assert client.switch("chat", str(home.root / "code.gguf"))["success"]
    wait_until(lambda: told(home, "saved") != [], "what it had is saved once it has no clients")

    back = client.switch("chat", None)

    assert (back["message"], back["warm_tokens"]) == ("chat serves chat.gguf now", 0)
    talk(home)


@pytest.mark.parametrize("fault", ["refuses", "fails", "cuts", "lies", "hangs"])
def test_a_server_that_cannot_save_comes_back_cold(home: Home, fault: str) -> None:
    stack(home, env={"SLOTS": fault})
    talk(home)

    began = time.monotonic()
    result = away_and_back(home)

    assert told(home, "saved") == []
    assert time.monotonic() - began < 10, "whatever drain_timeout says"
    expect_cold(home, result)


@pytest.mark.parametrize("fault", ["forgets", "computes"])
def test_what_a_server_does_not_say_itself_is_not_claimed(home: Home, fault: str) -> None:
    stack(home, env={"SLOTS": fault})
    talk(home)

    result = away_and_back(home)

    assert len(told(home, "saved")) == 1
    assert (result["warm_tokens"], kept(home), told(home, "warmed")) == (0, [], [])
    talk(home)
    away_and_back(home)
    assert len(told(home, "saved")) == 1, "it is of no use, and is not tried again"


def test_a_server_that_dies_of_it_is_started_again_and_the_switch_goes_on(home: Home) -> None:
    stack(home, env={"SLOTS": "dies"})
    talk(home)

    result = away_and_back(home)

    assert result["message"] == "chat serves chat.gguf now"
    assert (result["warm_tokens"], kept(home)) == (0, [])
    (death,) = [each for each in home.events() if each["event"] == "death"]
    assert (death["cause"], death["next"]) == ("its saved prompt cache", "restarted at once")
    talk(home)
    assert away_and_back(home)["success"]
    assert len(told(home, "death")) == len(told(home, "saved")) == 1, "it is not tried again"


def _append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def _scribble(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"x" * 50)


def _replace(file: Path, make: Callable[[Path], None]) -> None:
    file.unlink()
    make(file)


def _link(file: Path) -> None:
    file.symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-1]), id="cut off"),
        pytest.param(_scribble, id="written to"),
        pytest.param(_append, id="longer"),
        pytest.param(Path.unlink, id="gone"),
        pytest.param(lambda file: _replace(file, Path.mkdir), id="a directory"),
        pytest.param(lambda file: _replace(file, os.mkfifo), id="a pipe"),
        pytest.param(lambda file: _replace(file, _link), id="a link"),
        pytest.param(lambda file: file.write_bytes(b"GGUF" + b"\xff" * 500), id="foreign"),
    ],
)
def test_a_file_that_is_not_as_it_was_left_is_given_to_no_server(home: Home, spoil: Any) -> None:
    """Given one, a llama-server would die of it, or answer nonsense."""
    stack(home)
    talk(home)
    switch(home, "code")
    (file,) = kept(home)
    spoil(file)

    result = switch(home, "chat")

    if file.is_dir():
        file.rmdir()
    expect_cold(home, result)


@pytest.mark.parametrize(
    "change",
    ["ctx_size = 8192", 'cache_type_k = "q8_0"', "parallel = 2", 'args = ["--rope-scale", "2"]'],
)
def test_another_context_or_cache_begins_anew(home: Home, change: str) -> None:
    stack(home)
    talk(home)
    switch(home, "code")
    text = home.profile.read_text().replace("[service.chat]", f"[service.chat]\n{change}")
    home.profile.write_text(text)
    assert home.cli("reload").returncode == 0
    home.wait_state("chat", "stopped")
    assert len(kept(home)) == 1

    result = switch(home, "chat")

    assert (result["warm_tokens"], told(home, "warmed")) == (0, [])


def test_another_file_at_the_place_of_the_model_begins_anew(home: Home) -> None:
    stack(home)
    talk(home)
    switch(home, "code")
    model = home.root / "chat.gguf"
    data = model.read_bytes()
    model.unlink()
    model.write_bytes(data)

    assert switch(home, "chat")["warm_tokens"] == 0


def test_a_model_that_was_replaced_under_its_server_is_not_taken_for_the_new_one(
    home: Home,
) -> None:
    stack(home)
    talk(home)
    model = home.root / "chat.gguf"
    data = model.read_bytes()
    model.unlink()
    model.write_bytes(data)

    result = away_and_back(home)

    assert told(home, "saved") == []
    assert result["warm_tokens"] == 0


def test_after_its_time_it_is_cold(home: Home) -> None:
    stack(home, warm_for="1s")
    talk(home)
    switch(home, "code")
    assert len(told(home, "saved")) == 1
    time.sleep(1.1)

    assert switch(home, "chat")["warm_tokens"] == 0


def test_nothing_is_written_where_the_profile_says_so(home: Home) -> None:
    stack(home, warm_for="0s")
    talk(home)
    port = home.service("chat")["port"]
    refused = httpx.post(f"http://127.0.0.1:{port}/slots/0?action=save", json={"filename": "x"})

    result = away_and_back(home)

    assert refused.status_code == 501, "its server cannot either"
    expect_cold(home, result)
    assert told(home, "saved") == []


def test_a_few_words_are_not_kept(home: Home) -> None:
    stack(home)
    talk(home, "hi")
    assert 0 < held(home) < TOKENS_MIN
    switch(home, "code")
    assert (told(home, "saved"), kept(home)) == ([], [])


def test_a_new_daemon_has_what_the_one_before_kept(home: Home) -> None:
    stack(home)
    talk(home)
    tokens = held(home)
    switch(home, "code")
    stray = home.paths.slots / "stray"
    stray.write_bytes(b"x")

    assert home.cli("restart", "--daemon").returncode == 0

    wait_until(lambda: not stray.exists(), "what nobody knows of is removed")
    assert switch(home, "chat")["warm_tokens"] == tokens
    assert home.cli("restart", "--daemon").returncode == 0
    home.wait_state("chat", "ready")
    assert held(home) == tokens, "an adopted server is left as it is"
    assert away_and_back(home)["warm_tokens"] == tokens


def test_the_end_of_the_stack_leaves_no_conversation(home: Home) -> None:
    stack(home, mode="dual")
    talk(home)
    assert home.cli("stop", "chat").returncode == 0
    assert len(kept(home)) == 1

    assert home.cli("stop").returncode == 0

    assert not home.paths.slots.exists()
    assert not home.paths.slot_index.exists()
    assert len(told(home, "saved")) == 1


def test_what_a_killed_daemon_leaves_is_removed_by_a_stop(home: Home) -> None:
    stack(home, mode="dual")
    talk(home)
    assert home.cli("stop", "chat").returncode == 0
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: home.daemon_pid() is None, "its end")

    assert home.cli("stop").returncode == 0

    assert not home.paths.slots.exists()


def test_a_stop_that_does_not_wait_keeps_nothing(home: Home) -> None:
    stack(home, mode="dual")
    talk(home)
    assert home.cli("stop", "--now", "chat").returncode == 0
    assert (kept(home), told(home, "saved")) == ([], [])


def test_a_death_is_answered_without_any_of_this(home: Home) -> None:
    """Given a server that is killed after it came back warm."""
    stack(home)
    talk(home)
    assert away_and_back(home)["warm_tokens"]
    before = home.service("chat")
    os.kill(before["pid"], signal.SIGKILL)
    home.wait_replaced(before)
    assert held(home) == 0
    assert len(told(home, "saved")) == len(told(home, "warmed")) == 1


def test_an_unloaded_server_is_loaded_warm_by_the_next_request(home: Home) -> None:
    stack(home, mode="dual", ttl="1s")
    talk(home)
    tokens = held(home)
    home.wait_state("chat", "stopped")

    talk(home, "hi" * 40)

    (warmed,) = told(home, "warmed")
    assert warmed.startswith(f"{tokens} tokens")


@pytest.fixture
def home_on_a_small_disk() -> Iterator[Home]:
    with small_disk("tmpfs", size_mib=64) as disk:
        place = Home(disk.path)
        try:
            yield place
        finally:
            place.close()


def test_a_disk_without_much_room_gets_nothing(home_on_a_small_disk: Home) -> None:
    home = home_on_a_small_disk
    stack(home)
    talk(home)

    result = away_and_back(home)

    assert told(home, "saved") == []
    assert home.status()["daemon"]["troubles"] == []
    expect_cold(home, result)


def test_a_server_that_is_silent_holds_nobody_up(home: Home) -> None:
    stack(home)
    talk(home)
    httpx.post(f"http://127.0.0.1:{home.service('chat')['port']}/stub/mute")

    began = time.monotonic()
    switch(home, "code")

    assert time.monotonic() - began < 10, "whatever drain_timeout says"
    assert told(home, "saved") == []


def test_what_was_kept_for_long_enough_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an hour that the machine slept through, and another service that has time left."""
    directory, index, now_time = tmp_path / "slots", tmp_path / "slots.json", [1000.0]
    directory.mkdir()
    saves = []
    for name, keep_s in (("chat", 3600.0), ("code", 9000.0)):
        (directory / name).write_bytes(b"x")
        saves.append(Saved(name, name, "key", 0, 100, 1, 1000.0, 1000.0 + keep_s, ()))
    slot_files.save(index, saves)
    monkeypatch.setattr("llmsup.warmth.LOOK_PERIOD_S", 0.01)

    async def keep() -> None:
        kept = Warmth(
            directory,
            index,
            Journal(tmp_path / "events", Troubles()),
            wall_time=lambda: now_time[0],
        )
        kept.begin({"chat", "code"})
        task = asyncio.create_task(kept.keep())
        await asyncio.sleep(0.1)
        assert len(list(directory.iterdir())) == 2
        now_time[0] += 3600
        while (directory / "chat").exists():
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(keep(), 30))
    assert [each.service for each in slot_files.load(index)] == ["code"]


def test_a_directory_that_somebody_removed_is_no_trouble(home: Home) -> None:
    stack(home)
    talk(home)
    home.paths.slots.rmdir()
    assert away_and_back(home)["success"], "it is made anew"
    assert home.paths.slots.is_dir()
