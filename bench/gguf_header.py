"""What looking at a model's header costs, beside PyPI's `gguf.GGUFReader` on the same files.

`python -m bench.gguf_header [--rounds N] [FILE…]`; without files: the two small real models.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import line, spread
from bench.models import gemma, smollm2
from llmsup.core.gguf import Model
from llmsup.host import gguf

RATIO_MIN = 100.0


def timed(read: Callable[[Path], object], path: Path) -> float:
    started = time.perf_counter()
    read(path)
    return time.perf_counter() - started


def anew(path: Path) -> Model:
    gguf.read.cache_clear()
    return gguf.look(path)


def peer() -> Callable[[Path], object] | None:
    """The reader of the package `gguf`, where it is installed."""
    try:
        from gguf import GGUFReader  # noqa: PLC0415
    except ImportError as error:
        print(f"gguf.GGUFReader is not compared: {error} (pip install gguf)")
        return None
    return lambda path: GGUFReader(str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()
    theirs = peer()
    holds = True
    for path in arguments.files or [smollm2(), gemma()]:
        model = anew(path)
        print(f"{path.name}: {len(model.tensors)} tensors, {model.vocabulary_size} tokens")
        ours = [timed(anew, path) for _ in range(arguments.rounds)]
        line("header", spread(ours))
        again_us = statistics.median(timed(gguf.look, path) for _ in ours) * 1e6
        line("header, looked at before", f"{again_us:8.0f} us median")
        if theirs is None:
            continue
        peer_s = timed(theirs, path)  # seconds: it makes an array of each token
        line("gguf.GGUFReader", f"{peer_s * 1000:8.1f} ms once")
        ratio = peer_s / statistics.median(ours)
        word = "holds" if ratio >= RATIO_MIN else "BROKEN"
        line("times faster", f"{ratio:8.0f}     at least {RATIO_MIN:.0f}  {word}")
        holds = holds and ratio >= RATIO_MIN
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
