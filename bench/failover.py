"""Kills the primary ten times under eight closed-loop clients and measures what they feel.

Two stub upstreams answer in 5 ms; the gateway and the daemon are the real ones.
`python -m bench.failover [--kills N]`
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time

from bench.figures import line, spread, verdict
from bench.load import Load, chat_body
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
    worst = [max(r.wait_s for r in load.within(at, at + 0.5)) for at, _ in killed]
    usual = statistics.median(record.wait_s for record in load.records)
    events = home.events()
    spawned, confirmed = [], []
    for at, generation in killed:
        spawned.append(
            next(
                e["at_s"] - at
                for e in events
                if e.get("service") == "chat"
                and e["event"] == "state"
                and e["generation"] == generation + 1
                and e["state"] == "starting"
            )
        )
        confirmed.append(
            next(e["at_s"] - at for e in events if e["event"] == "confirmed" and e["at_s"] > at)
        )
    fallback = sum(record.is_fallback for record in load.records)
    print(f"{len(killed)} kills of the primary under {load.clients} closed-loop clients")
    line("requests", f"{total:8d}, {fallback} of them answered by the fallback")
    line("in flight at the kills", f"{in_flight:8d}")
    line("wait of a request", f"{usual * 1000:8.1f} ms median")
    line("worst wait per kill", spread(worst))
    line("death to the decision to spawn", spread(spawned))
    line("death to the list Envoy uses", spread(confirmed))
    for record in failed[:5]:
        line("failed", f"{record.status} {record.error}")
    return all(
        [
            verdict("failed requests", len(failed), 0, ""),
            verdict("worst wait, median over kills", statistics.median(worst) * 1000, 30, "ms"),
            verdict("list confirmed, median", statistics.median(confirmed) * 1000, 50, "ms"),
        ]
    )


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
