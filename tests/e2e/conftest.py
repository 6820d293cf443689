"""One stack of real parts for the tests that do not break it for good."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.models import gemma, smollm2
from tests.e2e.small_card import OVERHEAD_MIB, TOTAL_MIB
from tests.home import Home, free_ports
from tests.standin import StandIn


def real_stack(home: Home, **overrides: str) -> None:
    """Two real llama-servers, SmolLM2 as chat and Gemma as code, on the CPU."""
    chat, code = free_ports(2)
    text = f'[models]\ndirs = ["{smollm2().parent}", "{gemma().parent}"]\n'
    for name, port, model in (("chat", chat, smollm2().name), ("code", code, gemma().name)):
        lines = {
            "kind": '"llama-server"',
            "model": f'"{overrides.get(f"{name}_model", model)}"',
            "port": str(port),
            "gpu_layers": "0",
            "ctx_size": "4096",
            "parallel": "4",
            "args": '["--threads", "1"]',
            "grace_period": '"5s"',
            "readiness": '{ http_get = "/health", period = "500ms" }',
            "restart": '{ backoff = "100ms", max_deaths = 20 }',
        }
        text += f"[service.{name}]\n" + "".join(f"{k} = {v}\n" for k, v in lines.items())
    text += '[route."chat-3b"]\nservices = ["chat", "code"]\naliases = ["gpt-4o-mini"]\n'
    text += '[route."code-7b"]\nservices = ["code", "chat"]\n'
    home.write(text)


@pytest.fixture(scope="module")
def stack() -> Iterator[Home]:
    """The real stack, up."""
    place = Home()
    try:
        real_stack(place)
        place.start(timeout_s=90)
        yield place
        result = place.cli("stop")
        assert result.returncode == 0, result.stderr
        assert place.processes() == []
    finally:
        place.close()


@pytest.fixture
def small_card(card_library: Path, tmp_path: Path) -> StandIn:
    """A card that nobody uses yet, too small for two small models."""
    return StandIn(
        tmp_path, card_library, total_mib=TOTAL_MIB, reserved_mib=0, overhead_mib=OVERHEAD_MIB
    )


@pytest.fixture
def on_card(home: Home, small_card: StandIn) -> Home:
    """A home whose daemon and servers see that card."""
    home.environ |= small_card.environ
    return home
