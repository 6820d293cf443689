"""What a cold request costs beyond the load, and what fifty at once cost.

Beside it, in turn: llama-server by itself, which loads the same model and gets the same request
(its first answer is slower than those after it, with llmsup or without).
`python -m bench.on_demand [--rounds N]`
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import line, spread, verdict
from bench.models import gemma
from bench.plain_server import arguments_of, plain_server
from llmsup.drill.traffic import Client, Record, chat_body
from tests.home import Home, free_ports

ROUNDS = 10
WARM = 3
CROWD = 50
LIMIT_MS = 150
BODY = chat_body("chat", max_tokens=1)


@dataclass(frozen=True)
class Round:
    """One cold request, and what it is compared with, in seconds."""

    cold_s: float
    warm_s: float
    load_s: float
    plain_load_s: float
    plain_first_s: float

    @property
    def beyond_s(self) -> float:
        """What it took beyond the load that the daemon saw, and a first answer."""
        return self.cold_s - self.load_s - self.plain_first_s

    @property
    def beyond_plain_s(self) -> float:
        """What it took beyond what llama-server takes by itself."""
        return self.cold_s - self.plain_load_s - self.plain_first_s


def write_profile(home: Home) -> None:
    (port,) = free_ports(1)
    model = gemma()
    home.write(
        f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n'
        f'[models]\ndirs = ["{model.parent}"]\n'
        f'[service.chat]\nkind = "llama-server"\nmodel = "{model.name}"\nport = {port}\n'
        'gpu_layers = 0\nctx_size = 4096\nparallel = 4\nargs = ["--threads", "1"]\n'
        'start = "on-demand"\n'
    )


def ask(home: Home, count: int = 1) -> list[Record]:
    """The answers to so many requests at once. Ends the run where one fails."""

    async def one() -> Record:
        client = Client("127.0.0.1", home.gateway_port)
        try:
            return await client.ask(BODY)
        finally:
            await client.close()

    async def all_of_them() -> list[Record]:
        return list(await asyncio.gather(*(one() for _ in range(count))))

    records = asyncio.run(all_of_them())
    if failed := [record for record in records if record.failed]:
        raise SystemExit(f"error: {len(failed)} requests failed: {failed[0].error}")
    return records


def unload(home: Home) -> None:
    result = home.cli("stop", "chat")
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    home.wait_state("chat", "stopped")


def load_s(home: Home) -> float:
    """From the decision to spawn the last generation until it was ready, by the journal."""
    at = {
        event["state"]: float(event["at_s"])
        for event in home.events()
        if event["event"] == "state" and event["service"] == "chat"
    }
    return at["ready"] - at["starting"]


def measure(home: Home) -> Round:
    """A cold request, warm ones, and the load by itself; the service is unloaded at the end."""
    cold_s = ask(home)[0].wait_s
    warm_s = [ask(home)[0].wait_s for _ in range(WARM)]
    loaded_s = load_s(home)
    argv = arguments_of(home.service("chat")["pid"])
    unload(home)
    with plain_server(argv, gemma(), home.root / "plain.log") as server:
        asked_at = time.monotonic()
        server.prompt_tokens(BODY)
        first_s = time.monotonic() - asked_at
        return Round(cold_s, statistics.median(warm_s), loaded_s, server.load_s, first_s)


def report(rounds: Sequence[Round], crowd: Sequence[Record], crowd_s: float, loads: int) -> bool:
    print(f"{len(rounds)} cold requests, {gemma().name}")
    line("cold request", spread([each.cold_s for each in rounds]))
    line("  load, as the daemon saw it", spread([each.load_s for each in rounds]))
    line("warm request", spread([each.warm_s for each in rounds]))
    line("llama-server by itself: load", spread([each.plain_load_s for each in rounds]))
    line("  its first answer", spread([each.plain_first_s for each in rounds]))
    beyond_s = [each.beyond_s for each in rounds]
    line("cold - load - first answer", spread(beyond_s))
    beyond_plain_s = [each.beyond_plain_s for each in rounds]
    line("cold - llama-server by itself", spread(beyond_plain_s))
    print(f"{len(crowd)} cold requests at once")
    line("until the last answer", f"{crowd_s * 1000:8.1f} ms")
    line("answers", f"{sum(not record.failed for record in crowd):8d}")
    return all(
        [
            verdict(
                "beyond load and first answer", statistics.median(beyond_s) * 1000, LIMIT_MS, "ms"
            ),
            verdict("loads for all of them", loads, 1, ""),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    home = Home()
    try:
        write_profile(home)
        home.start()
        measure(home)  # the engine and the model are in the page cache then; it is not counted
        rounds = [measure(home) for _ in range(arguments.rounds)]
        before = home.service("chat")["generation"]
        began = time.monotonic()
        crowd = ask(home, CROWD)
        crowd_s = time.monotonic() - began
        loads = home.service("chat")["generation"] - before
        return 0 if report(rounds, crowd, crowd_s, loads) else 1
    finally:
        home.close()


if __name__ == "__main__":
    sys.exit(main())
