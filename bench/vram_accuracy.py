"""How far estimates are from what llama.cpp itself accounts for, model by model.

`python -m bench.vram_accuracy [--every N]`; the closed form of the compute buffer stands beside.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from bench.closed_form import closed_form
from bench.figures import line, verdict
from llmsup.core.estimate import estimate
from llmsup.core.estimate.effective import effective
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape, shape_of
from tests.model_shapes import published, unseen
from tests.vram_cells import ORACLE, Cell, cells

MIB = 1024 * 1024
UNSEEN = Path(ORACLE).with_name("vram-cells-unseen.csv.gz")
WITHIN_MIB, MAX_MIB, UNDER_MIB = 16.0, 64.0, 32.0
"""Of totals with flash attention on auto and batches of 512: 95 % within, all within, below."""


ROUNDS = 25
QUICK = (
    ("qwen2.5-3b", Options(gpu_layers=37), 1.5),
    ("qwen2.5-3b", Options(gpu_layers=20), 3.0),
    ("qwen3-30b-a3b", Options(gpu_layers=49), 3.0),
    ("qwen3-30b-a3b", Options(gpu_layers=49, n_cpu_moe=30), 5.0),
)
"""Model, options, and the milliseconds that one estimate may take."""


class Errors(NamedTuple):
    """Estimated less measured, in MiB."""

    weights: float
    cache: float
    compute: float
    closed: float
    is_typical: bool

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.compute


def errors(cell: Cell, shape: ModelShape) -> Errors:
    device = estimate(shape, cell.options).device
    options = cell.options
    return Errors(
        device.weights_bytes / MIB - cell.weights_mib,
        device.kv_cache_bytes / MIB - cell.kv_cache_mib,
        device.compute_bytes / MIB - cell.compute_mib,
        closed_form(shape, effective(shape, options)) / MIB - cell.compute_mib,
        options.flash_attn == "auto" and options.ubatch == 512,
    )


def spread(values: list[float]) -> str:
    ordered = sorted(abs(each) for each in values)
    p95 = ordered[len(ordered) * 95 // 100]
    return f"{ordered[len(ordered) // 2]:7.2f} {p95:8.2f} {ordered[-1]:8.2f}"


def table(found: dict[str, list[Errors]]) -> None:
    print(
        f"{'':22}{'':6}{'weights':>8}{'KV':>7}   {'compute, MiB':^25}   {'total':>8} {'under':>8}"
        f"   {'closed form: compute':^25}"
    )
    print(
        f"{'model':22}{'cells':>6}{'max':>8}{'max':>7}   {'med':>7} {'p95':>8} {'max':>8}"
        f"   {'max':>8} {'':8}   {'med':>7} {'p95':>8} {'max':>8}"
    )
    for name, each in found.items():
        weights = max(abs(error.weights) for error in each)
        cache = max(abs(error.cache) for error in each)
        totals = [error.total for error in each]
        print(
            f"{name:22}{len(each):6}{weights:8.3f}{cache:7.3f}"
            f"   {spread([error.compute for error in each])}"
            f"   {max(map(abs, totals)):8.2f} {min(0.0, *totals):8.2f}"
            f"   {spread([error.closed for error in each])}"
        )  # fmt: skip


def holds(found: dict[str, list[Errors]]) -> bool:
    everything = [error for each in found.values() for error in each]
    totals = [error.total for error in everything if error.is_typical]
    share = sum(abs(each) <= WITHIN_MIB for each in totals) / len(totals)
    buffers = max(max(abs(error.weights), abs(error.cache)) for error in everything)
    checks = {
        f"weights and cache at most {buffers:.3f} MiB off": buffers <= 0.1,
        f"{share:.1%} of typical totals within {WITHIN_MIB:.0f} MiB": share >= 0.95,
        f"the worst of them {max(map(abs, totals)):.2f} MiB off": max(map(abs, totals)) <= MAX_MIB,
        f"the lowest {-min(0.0, *totals):.2f} MiB below": min(totals) >= -UNDER_MIB,
    }
    for what, check in checks.items():
        line(what, "holds" if check else "BROKEN")
    return all(checks.values())


def is_quick(shape: ModelShape, options: Options, limit_ms: float) -> bool:
    """Times one estimate, each time anew. Processor time: other programs do not count."""
    times = []
    for _ in range(ROUNDS):
        estimate.cache_clear()
        started = time.process_time()
        estimate(shape, options)
        times.append(time.process_time() - started)
    layers = f"{min(options.gpu_layers, shape.layers)} of {shape.layers} layers"
    experts = f", experts of {options.n_cpu_moe} not" if options.n_cpu_moe else ""
    label = f"{layers} on the card{experts}"
    return verdict(label, statistics.median(times) * 1000, limit_ms, "ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only each n-th cell")
    arguments = parser.parse_args()
    shapes: dict[str, ModelShape] = {}
    found: dict[str, list[Errors]] = defaultdict(list)
    for number, cell in enumerate(cells()):
        if number % arguments.every:
            continue
        if cell.model not in shapes:
            shapes[cell.model] = shape_of(published(cell.model))
        found[cell.model].append(errors(cell, shapes[cell.model]))
    table(found)
    seen = holds(found)
    others: dict[str, list[Errors]] = defaultdict(list)
    for cell in cells(UNSEEN):
        if cell.model not in shapes:
            shapes[cell.model] = shape_of(unseen(cell.model))
        others[cell.model].append(errors(cell, shapes[cell.model]))
    print()
    table(others)
    unseen_holds = holds(others)
    quick = [is_quick(shapes[name], options, limit) for name, options, limit in QUICK]
    return 0 if seen and unseen_holds and all(quick) else 1


if __name__ == "__main__":
    sys.exit(main())
