"""Some cells of the oracle file, and all that were measured of other models."""

from functools import lru_cache
from pathlib import Path

import pytest

from llmsup.core.shape import ModelShape, shape_of
from tests.model_shapes import published, unseen
from tests.unseen_models import MODELS
from tests.vram_cells import ORACLE, Cell, cells
from tests.vram_judgement import TYPICAL_P95_MIB, errors, judge, share_within

UNSEEN = Path(__file__).parents[1] / "data" / "vram-cells-unseen.csv.gz"


@lru_cache
def seen(name: str) -> ModelShape:
    return shape_of(published(name))


@lru_cache
def unseen_shape(name: str) -> ModelShape:
    return shape_of(unseen(name))


def test_a_sample_of_the_oracle_is_met_in_every_buffer() -> None:
    typical = judge(list(cells(ORACLE))[::61], seen)
    assert share_within(typical, 1.0) >= 0.99


@pytest.fixture(scope="module")
def unseen_cells() -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells(UNSEEN):
        found.setdefault(cell.model, []).append(cell)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_no_rule_was_made_for_is_met_too(
    name: str, unseen_cells: dict[str, list[Cell]]
) -> None:
    assert unseen_cells[name]
    judge(unseen_cells[name], unseen_shape)


def test_nearly_all_of_them_are_met_to_a_mib(unseen_cells: dict[str, list[Cell]]) -> None:
    totals = [
        errors(cell, unseen_shape(name))[2] for name, mine in unseen_cells.items() for cell in mine
    ]
    assert share_within(totals, TYPICAL_P95_MIB) >= 0.99
    assert share_within(totals, 1.0) >= 0.97
