"""The cells that estimates are held to are what this machine's llama-server takes."""

import random
from pathlib import Path

import pytest

from tests.gguf_files import write_sparse
from tests.unseen_models import MODELS
from tests.unseen_shapes import header
from tests.vram_oracle import CELLS, TOLERANCE_MIB, Card, Taken, read

SAMPLES = (
    "llama-2-7b",
    "mixtral-8x7b",
    "gemma-2-2b",
    "deepseek-absorbed",
    "qwen3.5-4b",
    "bge-small",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_cell_measured_anew_is_what_the_file_says(
    name: str, card_library: Path, tmp_path: Path
) -> None:
    cells = {cell: taken for cell, taken in read(CELLS).items() if cell.model == name}
    cell = random.Random(4).choice(list(cells))
    model = write_sparse(tmp_path / "model.gguf", *header(MODELS[name]))
    taken = Card(tmp_path, card_library).load(model, cell)
    assert isinstance(taken, Taken), f"{cell}: {taken}"
    assert abs(taken.weights - cells[cell].weights) <= TOLERANCE_MIB, cell
    assert abs(taken.kv - cells[cell].kv) <= TOLERANCE_MIB, cell
    assert abs(taken.compute - cells[cell].compute) <= TOLERANCE_MIB, cell


def test_there_are_cells_of_every_model() -> None:
    assert {cell.model for cell in read(CELLS)} == set(MODELS)
