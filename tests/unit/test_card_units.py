"""What a profile says of the card, and what a unit makes of a grant."""

import sys
from pathlib import Path

import pytest

from llmsup.attendance import Unit
from llmsup.config.paths import paths
from llmsup.config.schema import LlamaServer, Profile
from llmsup.core.grant import Grant, Written, read
from llmsup.core.options import Options
from llmsup.core.plan import Placement, Price
from llmsup.core.sizes import Estimate, Sizes
from llmsup.units import build


def unit(root: Path, **keys: object) -> Unit:
    spec = LlamaServer(model="/m.gguf", binary=sys.executable, port=8001, **keys)  # type: ignore[arg-type]
    home = paths({"LLMSUP_HOME": str(root)})
    units = build(Profile(service={"chat": spec}), home, {}, {}, lambda: None)
    return next(each for each in units if each.name == "chat")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, True),
        ({"gpu_layers": "all"}, True),
        ({"gpu_layers": 7}, True),
        ({"gpu_layers": 0}, False),
        ({"args": ("--device", "none")}, False),
        ({"args": ("-dev", "none"), "gpu_layers": 7}, False),
    ],
)
def test_who_may_use_the_card(tmp_path: Path, keys: dict[str, object], expected: bool) -> None:
    assert unit(tmp_path, **keys).uses_card is expected


def test_rank_is_by_pinned_then_priority_then_name(tmp_path: Path) -> None:
    assert unit(tmp_path, priority=3).rank == (True, -3, "chat")
    assert unit(tmp_path, pinned=True).rank < unit(tmp_path, priority=1000).rank


def test_a_grant_is_in_the_command_line_and_can_be_read_off_the_process(tmp_path: Path) -> None:
    options = Options(gpu_layers=12, ctx_size=2048)
    price = Price(Estimate(Sizes(), Sizes()), 0)
    placement = Placement("chat", "m.gguf", 37, options, price, "why")

    launch = unit(tmp_path).launch(Grant(placement, "GPU-1"))

    assert launch.argv[launch.argv.index("--gpu-layers") + 1] == "12"
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert read(launch.grant) == Written(options, "GPU-1")
    assert launch.digest != unit(tmp_path).launch().digest
