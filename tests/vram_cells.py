"""The cells of the oracle: what llama.cpp itself accounts for models and options."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmsup.core.options import Options

ORACLE = Path(__file__).parent / "data" / "vram-oracle.csv.gz"
_FLASH = {"2": "auto", "1": "on", "0": "off"}


class Cell(NamedTuple):
    """A model, its options, and the MiB of its buffers on the card, to two digits."""

    model: str
    options: Options
    weights_mib: float
    kv_cache_mib: float
    compute_mib: float

    @property
    def total_mib(self) -> float:
        return self.weights_mib + self.kv_cache_mib + self.compute_mib


def cells(path: Path = ORACLE) -> Iterator[Cell]:
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            options = Options(
                gpu_layers=int(row["ngl"]),
                n_cpu_moe=int(row["n_cpu_moe"]),
                ctx_size=int(row["ctx"]),
                parallel=int(row["np"]),
                kv_unified=row["unified"] == "1",
                cache_type_k=row["ctk"],
                cache_type_v=row["ctv"],
                batch=int(row["batch"]),
                ubatch=int(row["ubatch"]),
                flash_attn=_FLASH[row["fa"]],  # type: ignore[arg-type]
                pooled=row["embd"] == "1",
                kv_offload=row["nkvo"] == "0",
                swa_full=row["swa_full"] == "1",
            )
            yield Cell(
                row["model"],
                options,
                float(row["weights_mib"]),
                float(row["kv_mib"]),
                float(row["compute_mib"]),
            )
