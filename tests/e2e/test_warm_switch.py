"""Real servers come back with the conversation that they had when they gave way."""

import json
import stat
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.models import smollm2
from llmsup.control.client import Client
from llmsup.control.wire import SwitchResult
from tests.e2e.conftest import real_stack
from tests.home import Home

PROMPT_TOKENS_MIN = 200


class Conversation:
    """A chat with the service, over the gateway."""

    def __init__(self, home: Home, model: str = "chat-3b") -> None:
        self._url = f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions"
        self._model = model
        facts = "".join(f"Fact {n}: a box of size {n} holds {n * n} eggs. " for n in range(20))
        self._messages = [{"role": "user", "content": f"{facts} How many eggs fit in all of them?"}]
        self.service = ""
        self.tokens = 0

    def go_on(self) -> int:
        """One turn more. Returns how many tokens of it the server had in its cache."""
        body = {
            "model": self._model,
            "messages": self._messages,
            "max_tokens": 8,
            "temperature": 0,
        }
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            self.service = answer.headers["x-llmsup-service"]
            reply: dict[str, Any] = json.load(answer)
        said = reply["choices"][0]["message"]["content"]
        self._messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": "And then?"},
        ]
        self.tokens = reply["usage"]["total_tokens"]
        return int(reply["timings"]["cache_n"])


def stack(home: Home, keys: str = "", *, args: str = "", mode: str = "single") -> None:
    """SmolLM2 as chat and Gemma as code; `keys` are added to both. In single mode chat is up."""
    real_stack(home)
    text = home.profile.read_text().replace("parallel = 4\n", f"{keys}\n")
    text = text.replace('"--threads", "1"', f'"--threads", "1"{args}')
    active = 'active = "chat"\n' if mode == "single" else ""
    home.profile.write_text(f'mode = "{mode}"\n{active}{text}')
    home.start(timeout_s=90)


def switch(home: Home, target: str) -> SwitchResult:
    """Switch, and wait until the other has ended: where both fit, it does so afterwards."""
    result = Client(home.paths).switch(target, None)
    assert result["success"], result
    home.wait_state("code" if target == "chat" else "chat", "stopped")
    return result


def kept(home: Home) -> list[Path]:
    return sorted(home.paths.slots.iterdir())


def events(home: Home, name: str) -> list[dict[str, Any]]:
    return [each for each in home.events() if each["event"] == name]


def test_a_switch_away_and_back_goes_on_with_the_conversation(home: Home) -> None:
    stack(home)
    talk = Conversation(home)
    assert talk.go_on() == 0
    talk.go_on()
    before = talk.tokens
    assert before > PROMPT_TOKENS_MIN

    away = switch(home, "code")
    (file,) = kept(home)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (home.paths.slots, file)]
    back = switch(home, "chat")

    assert modes == [0o700, 0o600]
    assert away["warm_tokens"] == 0
    assert before - 2 <= back["warm_tokens"] <= before
    words = f"{back['warm_tokens']} tokens of earlier conversations are in its cache"
    assert back["message"] == f"chat serves {smollm2().name} now; {words}"
    assert kept(home) == [], "it has it back"
    assert talk.go_on() >= before - 2
    assert talk.service == "chat"
    assert len(events(home, "saved")) == len(events(home, "warmed")) == 1
    print(events(home, "saved")[0]["why"], "·", events(home, "warmed")[0]["why"])


def test_without_it_and_after_its_time_the_conversation_is_computed_anew(home: Home) -> None:
    stack(home, 'warm_for = "1s"')
    talk = Conversation(home)
    talk.go_on()
    before = talk.tokens
    switch(home, "code")
    assert len(events(home, "saved")) == 1
    time.sleep(1.1)

    back = switch(home, "chat")

    assert (back["warm_tokens"], back["message"]) == (0, f"chat serves {smollm2().name} now")
    assert talk.go_on() < before / 4, "the template of the chat may be there from the proof"


def test_another_size_of_the_context_begins_anew(home: Home) -> None:
    stack(home)
    talk = Conversation(home)
    talk.go_on()
    switch(home, "code")
    text = home.profile.read_text().replace("ctx_size = 4096", "ctx_size = 2048", 1)
    home.profile.write_text(text)
    assert home.cli("reload").returncode == 0
    home.wait_state("code", "ready")

    assert switch(home, "chat")["warm_tokens"] == 0
    assert events(home, "warmed") == []


def test_a_model_with_windows_says_nothing_that_its_cache_does_not_show(home: Home) -> None:
    """Gemma's saved cache ends where it would begin anew, so it is not even saved."""
    stack(home)
    switch(home, "code")
    talk = Conversation(home, "code-7b")
    talk.go_on()
    switch(home, "chat")
    assert kept(home) == []

    assert switch(home, "code")["warm_tokens"] == 0
    assert talk.go_on() < talk.tokens / 4


def test_with_all_of_its_cache_it_comes_back_warm_in_one_of_its_slots(home: Home) -> None:
    """Given four slots, of which one was used."""
    stack(home, "parallel = 4", args=', "--swa-full"')
    switch(home, "code")
    talk = Conversation(home, "code-7b")
    talk.go_on()
    before = talk.tokens
    switch(home, "chat")

    assert switch(home, "code")["warm_tokens"] >= before - 2
    assert talk.go_on() >= before - 2
    assert talk.service == "code"


def test_a_service_that_a_request_loads_again_is_warm(home: Home) -> None:
    stack(home, 'ttl = "2s"', mode="dual")
    talk = Conversation(home)
    talk.go_on()
    before = talk.tokens
    home.wait_state("chat", "stopped")

    assert talk.go_on() >= before - 2
    assert len(events(home, "warmed")) == 1
