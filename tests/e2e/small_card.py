"""A card that two small models do not fit on, with SmolLM2 as chat and Gemma as code.

The card is the stand-in: real llama-servers really offload to it, run out of it and answer.
"""

import asyncio
from functools import partial

from bench.models import gemma, smollm2
from llmsup.drill.traffic import Client, Record
from tests.home import Home, free_ports, wait_until

MIB = 2**20
TOTAL_MIB = 640
OVERHEAD_MIB = 24
HEADROOM_MIB = 40
OTHERS_MIB = 160
"""What other programs have anyway."""

SERVICES = ("chat", "code")
LONG = "Tell me a story about a dog and a cat who went to sea in a boat. " * 20


def profile(home: Home, rebalance: str) -> None:
    """SmolLM2 as chat before Gemma as code, each the other's fallback."""
    chat, code = free_ports(2)
    text = f"""
[models]
dirs = ["{smollm2().parent}", "{gemma().parent}"]
[gpu]
ceiling = "100%"
headroom = "{HEADROOM_MIB}MiB"
rebalance = "{rebalance}"
"""
    for name, port, model, priority in (
        ("chat", chat, smollm2().name, 10),
        ("code", code, gemma().name, 5),
    ):
        text += f"""
[service.{name}]
kind = "llama-server"
model = "{model}"
port = {port}
priority = {priority}
ctx_size = 2048
parallel = 2
args = ["--threads", "1"]
grace_period = "5s"
readiness = {{ http_get = "/health", period = "200ms" }}
restart = {{ backoff = "100ms", max_deaths = 20 }}
"""
    text += '[route."chat-3b"]\nservices = ["chat", "code"]\n'
    text += '[route."code-7b"]\nservices = ["code", "chat"]\n'
    home.write(text)


def deaths(home: Home, since: int = 0) -> list[dict[str, object]]:
    return [event for event in home.events()[since:] if event["event"] == "death"]


def layers(home: Home) -> dict[str, int]:
    return {name: int(home.service(name)["gpu_layers"]) for name in SERVICES}


def wait_measured(home: Home, *names: str) -> None:
    """Until it is known what the loads of these services took."""
    for name in names:
        wait_until(partial(_is_measured, home, name), f"{name} measured")


def _is_measured(home: Home, name: str) -> bool:
    return home.service(name)["measured_bytes"] is not None


def ask(home: Home, body: bytes) -> Record:
    async def run() -> Record:
        api = Client("127.0.0.1", home.gateway_port)
        record = await api.ask(body)
        await api.close()
        return record

    return asyncio.run(run())
