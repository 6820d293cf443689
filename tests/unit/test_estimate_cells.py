"""Some cells of the oracle file, and all that were measured of other models."""

from functools import lru_cache
from pathlib import Path

import pytest

from llmsup.core.gguf import Model
from llmsup.core.gguf_header import parse
from llmsup.core.shape import ModelShape, shape_of
from tests.gguf_files import header
from tests.model_shapes import published
from tests.unseen_models import MODELS
from tests.unseen_shapes import header as unseen_header
from tests.vram_cells import ORACLE, cells
from tests.vram_judgement import TYPICAL_P95_MIB, judge, share_within

UNSEEN = Path(__file__).parents[1] / "data" / "vram-cells-unseen.csv.gz"


@lru_cache
def seen(name: str) -> ModelShape:
    return shape_of(published(name))


@lru_cache
def unseen(name: str) -> ModelShape:
    metadata, tensors = unseen_header(MODELS[name])
    kept = {key: item for key, item in metadata.items() if not key.startswith("tokenizer.")}
    written, data_bytes = header(kept, tensors)
    parsed = parse(written, len(written) + data_bytes)
    assert parsed is not None
    return shape_of(Model((parsed,)))


def test_a_sample_of_the_oracle_is_met_in_every_buffer() -> None:
    typical = judge(list(cells(ORACLE))[::61], seen)
    assert share_within(typical, 1.0) >= 0.99


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_no_rule_was_made_for_is_met_too(name: str) -> None:
    mine = [cell for cell in cells(UNSEEN) if cell.model == name]
    assert mine
    typical = judge(mine, unseen)
    assert not typical or share_within(typical, TYPICAL_P95_MIB) >= 0.8
