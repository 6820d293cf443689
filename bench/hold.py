"""What the hold filter costs: the same requests through an Envoy with it and one without.

One client, a stub that answers at once, rounds interleaved. `python -m bench.hold [--rounds N]`
"""

import argparse
import asyncio
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from bench.figures import line
from llmsup.drill.traffic import Client, chat_body
from tests.home import Home, free_ports, stub

ROUNDS = 10
REQUESTS = 300
ANSWER = chat_body("chat")
STREAM = ANSWER[:-1] + b', "stream": true}'
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Side:
    """One gateway, and what was measured through it."""

    def __init__(self, hold_streams: str) -> None:
        self.home = Home()
        (port,) = free_ports(1)
        command = stub("upstream.py", "--port", port, "--events", "1", "--interval-ms", "0")
        self.home.write(
            f'[gateway]\nlisten = "127.0.0.1:{self.home.gateway_port}"\n'
            f'hold_streams = "{hold_streams}"\n'
            + self.home.command("chat", command, port=port, readiness={"http_get": "/health"})
            + '[route."chat"]\nservices = ["chat"]\n'
        )
        self.waits_s: dict[bytes, list[float]] = {ANSWER: [], STREAM: []}

    def start(self) -> None:
        self.home.start()
        self.pid = self.home.service("gateway")["pid"]

    async def run(self) -> None:
        client = Client("127.0.0.1", self.home.gateway_port)
        for body, waits_s in self.waits_s.items():
            for _ in range(REQUESTS):
                record = await client.ask(body)
                if record.failed:
                    raise SystemExit(f"error: a request failed: {record.error}")
                waits_s.append(record.wait_s)
        await client.close()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def rss_mib(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


def report(name: str, side: Side, cpu_s: float) -> None:
    answer, stream = (statistics.median(waits_s) * 1000 for waits_s in side.waits_s.values())
    requests = sum(map(len, side.waits_s.values()))
    line(
        name,
        f"answer {answer:.3f} ms, stream {stream:.3f} ms (medians of {requests // 2}), "
        f"CPU {cpu_s / requests * 1e6:.0f} us a request, RSS {side.rss_mib():.0f} MiB",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    sides = {"without": Side("off"), "with": Side("auto")}
    with ExitStack() as stack:
        for side in sides.values():
            stack.callback(side.home.close)
            side.start()
            asyncio.run(side.run())  # warms up, and is not counted
            for waits_s in side.waits_s.values():
                waits_s.clear()
        before = {name: side.cpu_s() for name, side in sides.items()}
        for _ in range(arguments.rounds):
            for side in sides.values():
                asyncio.run(side.run())
        print("the hold filter, one client, interleaved")
        for name, side in sides.items():
            report(name, side, side.cpu_s() - before[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
