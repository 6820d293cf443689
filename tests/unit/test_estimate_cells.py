"""Some cells of the oracle file, and all that were measured of other models."""

from functools import lru_cache
from pathlib import Path

import pytest

from llmsup.core.shape import ModelShape, shape_of
from tests.model_shapes import published, unseen
from tests.unseen_models import MODELS
from tests.vram_cells import ORACLE, cells
from tests.vram_judgement import TYPICAL_P95_MIB, judge, share_within

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


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_no_rule_was_made_for_is_met_too(name: str) -> None:
    mine = [cell for cell in cells(UNSEEN) if cell.model == name]
    assert mine
    typical = judge(mine, unseen_shape)
    assert not typical or share_within(typical, TYPICAL_P95_MIB) >= 0.95
