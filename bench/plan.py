"""What a plan of six models costs, once their headers are in the page cache.

`python -m bench.plan [--rounds N] [--total MIB]`; the models are sparse files of real dimensions.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import line, spread
from llmsup.config.schema import LlamaServer, Profile
from llmsup.core import estimate as estimates
from llmsup.core.device import Device
from llmsup.core.ledger import Ledger
from llmsup.host import gguf
from llmsup.sizing import Sizing
from tests.qwen_files import QWEN_3B, QWEN_7B, write_qwen

LIMIT_MS = 100.0
MIB = 2**20


def six(directory: Path) -> Profile:
    """Three of 3B and three of 7B; all may choose, so that all have to be tried."""
    services = {
        f"service{number}": LlamaServer(
            model=str(write_qwen(directory / f"{number}.gguf", (QWEN_3B, QWEN_7B)[number % 2])),
            ctx_size=4096 + 512 * number,
            degrade=("cache_type", "ubatch"),
        )
        for number in range(6)
    }
    return Profile(service=services)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--total", type=int, default=6141, metavar="MIB")
    arguments = parser.parse_args()
    total_bytes = arguments.total * MIB
    card = Device(0, "", "a card", "", total_bytes, total_bytes, 0)
    with tempfile.TemporaryDirectory(prefix="llmsup-bench-") as directory:
        profile = six(Path(directory))
        names = tuple(profile.service)

        def anew() -> Sizing:
            gguf.read.cache_clear()
            estimates.estimate.cache_clear()
            estimates.buffers_at_least.cache_clear()
            return Sizing(profile, os.environ, Ledger, Path(directory, "engines.json"))

        first, again = [], []
        for _ in range(arguments.rounds):
            sizing = anew()
            first.append(timed(lambda: sizing.plan(card, names)))
            again.append(timed(lambda: sizing.plan(card, names)))
    print("a plan of six models on one card")
    line("headers read, nothing known", spread(first))
    line("planned before", spread(again))
    return 0 if min(first) * 1000 < LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
