"""Every cell of the oracle file: what llama.cpp itself accounts for 20 models and 15 404 loads."""

from collections import defaultdict

import pytest

from llmsup.core.estimate import estimate
from llmsup.core.shape import shape_of
from tests.model_shapes import PUBLISHED, published
from tests.vram_cells import Cell, cells
from tests.vram_judgement import TYPICAL_P95_MIB, errors, judge, share_within


@pytest.fixture(scope="module")
def by_model() -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells():
        found[cell.model].append(cell)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_estimates_are_what_the_engine_accounts_for(
    by_model: dict[str, list[Cell]], name: str
) -> None:
    shape = shape_of(published(name))
    mine = by_model[name]
    assert len(mine) >= 36
    typical = judge(mine, lambda _: shape)
    assert share_within(typical, TYPICAL_P95_MIB) >= 0.95
    all_of_them = [errors(cell, shape)[2] for cell in mine]
    assert share_within(all_of_them, 0.5) == 1.0
    estimate.cache_clear()
