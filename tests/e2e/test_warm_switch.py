"""Real servers come back with the conversation that they had when they gave way."""

import json
import stat
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from bench.models import gemma, smollm2
from llmsup.control.client import Client
from llmsup.control.wire import SwitchResult
from tests.e2e.conftest import real_stack
from tests.home import Home, free_ports, wait_until

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


def stack(home: Home, *, mode: str = "single", args: str = "", **keys: str) -> None:
    """SmolLM2 as chat and Gemma as code, of which one is up in single mode."""
    real_stack(home)
    text = home.profile.read_text().replace('parallel = "4"', "")
    text = text.replace("parallel = 4", "\n".join(f"{k} = {v}" for k, v in keys.items()))
    text = text.replace('["--threads", "1"]', f'["--threads", "1"{args}]')
    active = '\nactive = "chat"' if mode == "single" else ""
    home.profile.write_text(f'mode = "{mode}"{active}\n{text}')
    home.start(timeout_s=90)


def switch(home: Home, target: str, model: Path | None = None) -> SwitchResult:
    result = Client(home.paths).switch(target, None if model is None else str(model))
    assert result["success"], result
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
    words = f"{back['warm_tokens']} tokens of the last conversation are in its cache"
    assert back["message"] == f"chat serves {smollm2().name} now; {words}"
    assert kept(home) == [], "it has it back"
    assert talk.go_on() >= before - 2
    assert talk.service == "chat"
    assert len(events(home, "saved")) == len(events(home, "warmed")) == 1
    print(events(home, "saved")[0]["why"], "·", events(home, "warmed")[0]["why"])
