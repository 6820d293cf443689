"""Kills Envoy ten times: how long until it serves again, and what that costs its clients.

A probe connects anew all the time; eight closed-loop clients and one stream run beside it. What
fails is counted as it is: nobody can repeat a request whose gateway died.
`python -m bench.gateway_kill [--kills N]`
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass

from bench.figures import line, spread, verdict
from llmsup.drill.traffic import Load, chat_body
from tests.home import Home, free_ports, stub

CLIENTS = 8
PROBE_PAUSE_S = 0.001
SETTLE_S = 5.0  # a kill soon after another one is answered later, by a backoff
LIMIT_MS = 300
ALIVE = b"GET /llmsup/alive HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n"


@dataclass
class Outage:
    """One kill. Times are monotonic seconds."""

    killed_at: float
    decided_at: float = 0.0
    serves_at: float = 0.0
    refused: int = 0
    broken: int = 0


async def probe_until_it_serves(port: int, outage: Outage) -> None:
    """Connect anew until the gateway answers 200; count what was refused and what broke."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            outage.refused += 1
        else:
            writer.write(ALIVE)
            try:
                is_alive = (await reader.read(64)).startswith(b"HTTP/1.1 200")
            except OSError:
                is_alive = False
            writer.close()
            if is_alive:
                outage.serves_at = time.monotonic()
                return
            outage.broken += 1
        await asyncio.sleep(PROBE_PAUSE_S)


async def measure(home: Home, kills: int) -> tuple[Load, list[Outage]]:
    load = Load(home.gateway_port, chat_body("chat"), clients=CLIENTS, pause_s=0.01)
    load.start()
    outages = []
    for _ in range(kills):
        gateway = await asyncio.to_thread(home.wait_state, "gateway", "ready")
        await asyncio.sleep(SETTLE_S)
        outage = Outage(time.monotonic())
        os.kill(gateway["pid"], signal.SIGKILL)
        await probe_until_it_serves(home.gateway_port, outage)
        outages.append(outage)
        await asyncio.to_thread(home.wait_replaced, gateway)
        outage.decided_at = decision(home, gateway["generation"] + 1)
    await load.finish()
    return load, outages


def decision(home: Home, generation: int) -> float:
    """When the daemon decided to spawn the generation, by its journal."""
    return next(
        float(event["at_s"])
        for event in home.events()
        if event.get("service") == "gateway"
        and event["event"] == "state"
        and event["generation"] == generation
        and event["state"] == "starting"
    )


def report(load: Load, outages: list[Outage]) -> bool:
    total = [each.serves_at - each.killed_at for each in outages]
    in_flight = sum(
        record.failed for each in outages for record in load.within(each.killed_at, each.killed_at)
    )
    failed = sum(record.failed for record in load.records)
    print(f"{len(outages)} kills of Envoy under {CLIENTS} closed-loop clients")
    line("kill to the decision to spawn", spread([it.decided_at - it.killed_at for it in outages]))
    line("decision to the first 200", spread([it.serves_at - it.decided_at for it in outages]))
    line("kill to the first 200", spread(total))
    line("refused connections of the probe", f"{sum(each.refused for each in outages):8d}")
    line("broken connections of the probe", f"{sum(each.broken for each in outages):8d}")
    line("requests of the clients", f"{len(load.records):8d}")
    line("  in flight at a kill, lost", f"{in_flight:8d}")
    line("  refused or broken afterwards", f"{failed - in_flight:8d}")
    return verdict("kill to 200, median", statistics.median(total) * 1000, LIMIT_MS, "ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    home = Home()
    try:
        (port,) = free_ports(1)
        command = stub("upstream.py", "--port", port, "--name", "chat", "--delay-ms", "5")
        home.write(
            home.command("chat", command, port=port, readiness={"http_get": "/health"})
            + '[route."chat"]\nservices = ["chat"]\n'
        )
        home.start()
        return 0 if report(*asyncio.run(measure(home, arguments.kills))) else 1
    finally:
        home.close()


if __name__ == "__main__":
    sys.exit(main())
