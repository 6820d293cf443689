"""Kills the primary ten times under eight closed-loop clients and measures what they feel.

Two stub upstreams answer in 5 ms; the gateway and the daemon are the real ones.
`python -m bench.failover [--kills N]`
"""

import argparse
import asyncio
import math
import os
import signal
import statistics
import sys
import time
from typing import Any

from bench.figures import line, spread, verdict
from llmsup.drill.traffic import Load, chat_body
from tests.home import Home, free_ports, stub

CLIENTS = 8
SETTLE_S = 0.7


def write_profile(home: Home) -> None:
    chat, code = free_ports(2)
    text = ""
    for name, port in (("chat", chat), ("code", code)):
        text += home.command(
            name,
            stub("upstream.py", "--port", port, "--name", name, "--delay-ms", "5"),
            port=port,
            readiness={"http_get": "/health"},
            restart={"backoff": "0s", "max_deaths": 1000},
        )
    home.write(text + '[route."chat-7b"]\nservices = ["chat", "code"]\n')


async def measure(home: Home, kills: int) -> bool:
    load = Load(home.gateway_port, chat_body("chat-7b"), clients=CLIENTS)
    load.start()
    await asyncio.sleep(SETTLE_S)
    killed: list[tuple[float, int]] = []
    for _ in range(kills):
        chat = await asyncio.to_thread(home.wait_state, "chat", "ready")
        await asyncio.sleep(SETTLE_S)
        at = time.monotonic()
        os.kill(chat["pid"], signal.SIGKILL)
        killed.append((at, chat["generation"]))
        await asyncio.sleep(SETTLE_S)
    records = await load.finish()
    return report(home, load, killed, len(records))


def report(home: Home, load: Load, killed: list[tuple[float, int]], total: int) -> bool:
    failed = [record for record in load.records if record.failed]
    in_flight = sum(len(load.within(at, at)) for at, _ in killed)
    waits = [[r.wait_s for r in load.within(at, at + 0.5)] for at, _ in killed]
    worst = [max(each) for each in waits if each]
    events = home.events()
    spawned = [each for kill in killed for each in spawns(events, *kill)[:1]]
    confirmed = [each for at, _ in killed for each in confirmations(events, at)[:1]]
    fallback = sum(record.is_fallback for record in load.records)
    print(f"{len(killed)} kills of the primary under {load.clients} closed-loop clients")
    line("requests", f"{total:8d}, {fallback} of them answered by the fallback")
    line("in flight at the kills", f"{in_flight:8d}")
    line("wait of a request", spread([record.wait_s for record in load.records]))
    line("worst wait per kill", spread(worst))
    line("death to the decision to spawn", spread(spawned))
    line("death to the list Envoy uses", spread(confirmed))
    for record in failed[:5]:
        line("failed", f"{record.status} {record.error}")
    return all(
        [
            verdict("failed requests", len(failed), 0, ""),
            verdict("kills without a trace", unseen(killed, worst, spawned, confirmed), 0, ""),
            verdict("worst wait, median over kills", median_ms(worst), 30, "ms"),
            verdict("list confirmed, median", median_ms(confirmed), 50, "ms"),
        ]
    )


def spawns(events: list[dict[str, Any]], at: float, generation: int) -> list[float]:
    """Seconds from `at` to the decisions to spawn the generation after the one that was killed."""
    return [
        event["at_s"] - at
        for event in events
        if event.get("service") == "chat"
        and event["event"] == "state"
        and event["generation"] == generation + 1
        and event["state"] == "starting"
    ]


def confirmations(events: list[dict[str, Any]], at: float) -> list[float]:
    """Seconds from `at` to the lists that Envoy had later."""
    return [
        event["at_s"] - at
        for event in events
        if event["event"] == "confirmed" and event["at_s"] > at
    ]


def unseen(killed: list[tuple[float, int]], *found: list[float]) -> int:
    """How many kills are missing in the figures."""
    return len(killed) - min(len(each) for each in found)


def median_ms(values_s: list[float]) -> float:
    return statistics.median(values_s) * 1000 if values_s else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    home = Home()
    try:
        write_profile(home)
        home.start()
        return 0 if asyncio.run(measure(home, arguments.kills)) else 1
    finally:
        home.close()


if __name__ == "__main__":
    sys.exit(main())
