"""Whether a live process could be what a plan would make of its service now."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.conforming import conforms
from llmsup.core.grant import UNPLANNED, Grant, Written, read, written
from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Demand, Knob, Placement, Price
from llmsup.core.shrinking import Shrunk
from llmsup.core.sizes import Estimate, Sizes

BEST = Options(gpu_layers=37, ctx_size=8192)
NOTHING = Price(Estimate(Sizes(), Sizes()), 0)


def demand(knobs: Iterable[Knob] = Knob, degrade: tuple[Degrade, ...] = ()) -> Demand:
    return Demand(
        "chat", "model.gguf", 37, BEST, lambda _: NOTHING, lambda _: 0, frozenset(knobs), degrade,
        ctx_size_min=2048,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "knobs", "degrade", "expected"),
    [
        ({}, set(), (), True),
        ({"gpu_layers": 12}, {Knob.GPU_LAYERS}, (), True),
        ({"gpu_layers": 0}, {Knob.GPU_LAYERS}, (), True),
        ({"gpu_layers": 12}, set(), (), False),
        ({"gpu_layers": 38}, {Knob.GPU_LAYERS}, (), False),
        ({"n_cpu_moe": 20}, {Knob.GPU_LAYERS, Knob.N_CPU_MOE}, (), True),
        ({"n_cpu_moe": 20}, {Knob.GPU_LAYERS}, (), False),
        ({"ctx_size": 4096}, set(), (), False),
        ({"ctx_size": 4096}, set(), (Degrade.CTX_SIZE,), True),
        ({"ctx_size": 1024}, set(), (Degrade.CTX_SIZE,), False),
        ({"ctx_size": 16384}, set(), (Degrade.CTX_SIZE,), False),
        ({"ubatch": 128}, set(), (Degrade.UBATCH,), True),
        ({"ubatch": 1024}, set(), (Degrade.UBATCH,), False),
        ({"cache_type_k": "q8_0", "cache_type_v": "q8_0"}, set(), (Degrade.CACHE_TYPE,), True),
        ({"cache_type_k": "q4_0"}, set(), (Degrade.CACHE_TYPE,), False),
        ({"parallel": 4}, set(), tuple(Degrade), False),
    ],
)
def test_what_a_plan_may_choose_or_take_away_conforms(
    changed: dict[str, Any], knobs: set[Knob], degrade: tuple[Degrade, ...], expected: bool
) -> None:
    assert conforms(replace(BEST, **changed), demand(knobs, degrade)) is expected


@pytest.mark.parametrize(("layers", "expected"), [(37, True), (36, False), (0, True)])
def test_a_pinned_service_has_all_its_layers_or_no_card(layers: int, expected: bool) -> None:
    pinned = replace(demand(), pinned=True)
    assert conforms(replace(BEST, gpu_layers=layers), pinned) is expected


def test_a_grant_is_read_as_it_was_written() -> None:
    options = replace(BEST, gpu_layers=12, n_cpu_moe=3, cache_type_k="q8_0", flash_attn="on")
    placement = Placement("chat", "model.gguf", 37, options, NOTHING, "why")
    assert read(written(Grant(placement, "GPU-1"))) == Written(options, "GPU-1")
    assert read(written(Grant(None, "GPU-1"))) == Written(None, "GPU-1")
    shrunk = Shrunk(2000, None, 64, 1)
    assert read(written(Grant(placement, "", shrunk))) == Written(options, "", shrunk)
    assert written(UNPLANNED) == ""


@pytest.mark.parametrize("text", ["", "{}", "[", '{"options": {"gpu_layers": "x"}, "device": 1}'])
def test_what_is_no_grant_is_none(text: str) -> None:
    assert read(text) == Written()


def test_a_grant_of_an_earlier_version_is_read() -> None:
    assert read('{"options":null,"device":"GPU-1"}') == Written(None, "GPU-1")


@given(st.text())
def test_no_text_is_too_odd_to_be_read(text: str) -> None:
    assert read(text) == Written()
