"""Headers, ledger and `[gpu]` gathered into demands, a budget and a plan."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmsup import sizing
from llmsup.config.schema import Command, Gpu, LlamaServer, Profile, Service
from llmsup.config.units import Share
from llmsup.core.device import Absence, Device, NoDevice
from llmsup.core.ledger import Ledger, Record
from llmsup.core.options import Options
from llmsup.core.plan import Degrade
from llmsup.errors import Flaw, ModelFileError
from llmsup.sizing import Sizing, default_headroom_bytes
from tests.gguf_files import write_sparse
from tests.qwen_files import QWEN_3B, QWEN_7B, TINY, write_qwen

MIB = 2**20
CARD = Device(0, "GPU-1", "RTX 4050", "560.35", 6141 * MIB, 5800 * MIB, 341 * MIB)
NO_CARD = NoDevice(Absence.NO_LIBRARY, "no NVIDIA driver is installed")
ON_CARD = Options(gpu_layers=3, ctx_size=512)
Make = Callable[..., Sizing]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes the sizing of a profile; its engines were never asked."""

    def made(gpu: Gpu | None = None, **services: Service) -> Sizing:
        profile = Profile(gpu=gpu or Gpu(), service=services)
        return Sizing(profile, os.environ, Ledger, tmp_path / "engines.json")

    return made


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_qwen(tmp_path / "tiny.gguf", TINY))


@pytest.mark.parametrize(
    ("total_mib", "is_wsl", "mib"),
    [(6141, False, 256), (6141, True, 256), (24564, False, 256), (24564, True, 982)],
)
def test_under_wsl2_a_large_card_keeps_more_free(total_mib: int, is_wsl: bool, mib: int) -> None:
    assert default_headroom_bytes(total_mib * MIB, is_wsl=is_wsl) // MIB == mib


def test_what_the_profile_says_wins(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "is_wsl", lambda: True)
    large = Device(0, "GPU-1", "RTX 4090", "560.35", 24564 * MIB, 24000 * MIB, 564 * MIB)

    assert make().budget(large).headroom_bytes == int(24564 * MIB * 0.04)
    assert make(Gpu(headroom_bytes=MIB)).budget(large).headroom_bytes == MIB
    assert make(Gpu(headroom_bytes=0)).budget(large).headroom_bytes == 0


def test_the_budget_is_the_card_by_the_gpu_table(make: Make) -> None:
    gpu = Gpu(ceiling=Share(size_bytes=5000 * MIB), headroom_bytes=100 * MIB)

    budget = make(gpu).budget(CARD, reserved_bytes=300 * MIB, coming_back_bytes=200 * MIB)

    assert (budget.device_name, budget.total_bytes) == ("RTX 4050", 6141 * MIB)
    assert budget.free_bytes == 6000 * MIB
    assert budget.ceiling_bytes == 5000 * MIB
    assert budget.usable_bytes == (5000 - 141 - 300) * MIB
    assert make().budget(CARD).ceiling_bytes == int(6141 * MIB * 0.95)


def test_no_more_can_come_back_than_the_card_has(make: Make) -> None:
    assert make().budget(CARD, coming_back_bytes=9000 * MIB).free_bytes == 6141 * MIB


def test_a_demand_says_what_the_profile_says(make: Make, tiny: str) -> None:
    chat = LlamaServer(
        model=tiny, ctx_size=2048, ctx_size_min=1024, degrade=("ubatch", "ctx_size"), priority=7
    )

    demand = make(chat=chat).demand("chat", at_most_bytes=5)

    assert (demand.service, demand.model, demand.layers) == ("chat", "tiny.gguf", 3)
    assert (demand.asked.gpu_layers, demand.asked.ctx_size) == (3, 2048)
    assert demand.degrade == (Degrade.UBATCH, Degrade.CTX_SIZE)
    assert (demand.ctx_size_min, demand.priority, demand.pinned) == (1024, 7, False)
    assert (demand.has_experts, demand.at_most_bytes) == (False, 5)


def test_what_is_off_the_card_costs_nothing_on_it(make: Make, tiny: str) -> None:
    made = make(chat=LlamaServer(model=tiny))

    for price in (
        made.demand("chat").price(Options(gpu_layers=0)),
        made.demand("chat", reading=NO_CARD).price(Options(gpu_layers=3)),
    ):
        assert price.device_bytes == 0
        assert price.estimate.host.weights_bytes > 0


def test_the_least_is_no_more_than_the_price(make: Make, tiny: str) -> None:
    demand = make(chat=LlamaServer(model=tiny)).demand("chat")

    for layers in range(4):
        options = Options(gpu_layers=layers, ctx_size=512)
        assert demand.buffers_at_least(options) <= demand.price(options).device_bytes


def test_what_a_load_took_on_this_card_is_its_price(tiny: str, tmp_path: Path) -> None:
    known = [Ledger()]
    profile = Profile(
        service={
            "chat": LlamaServer(model=tiny),
            "drafted": LlamaServer(model=tiny, args=("--model-draft", tiny)),
        }
    )
    made = Sizing(profile, os.environ, lambda: known[0], tmp_path / "engines.json")
    estimated = made.demand("chat", reading=CARD).price(ON_CARD)

    key = made.key("chat", ON_CARD, CARD)
    buffers = estimated.estimate.device
    known[0] = known[0].learn(key, Record(buffers, buffers, buffers.total_bytes + 77 * MIB, 0.0))

    price = made.demand("chat", reading=CARD).price(ON_CARD)
    assert (estimated.is_measured, price.is_measured) == (False, True)
    assert price.device_bytes == buffers.total_bytes + 77 * MIB
    other = replace(CARD, uuid="GPU-2")
    assert not made.demand("chat", reading=other).price(ON_CARD).is_measured
    assert not made.demand("chat").price(ON_CARD).is_measured
    assert not made.demand("drafted", reading=CARD).price(ON_CARD).is_measured


def test_a_draft_model_is_on_the_card_as_a_whole(make: Make, tmp_path: Path, tiny: str) -> None:
    alone = LlamaServer(model=str(write_qwen(tmp_path / "3b.gguf", QWEN_3B)))
    drafted = LlamaServer(model=alone.model, args=("--model-draft", tiny))
    made = make(alone=alone, drafted=drafted)
    options = Options(gpu_layers=20, ctx_size=4096, cache_type_k="q8_0", cache_type_v="q8_0")

    one, two = (made.demand(name) for name in ("alone", "drafted"))
    added = two.price(options).device_bytes - one.price(options).device_bytes

    draft = make(draft=LlamaServer(model=tiny)).demand("draft")
    whole = draft.price(Options(gpu_layers=3, ctx_size=4096)).estimate.device.total_bytes
    assert added == whole
    assert two.buffers_at_least(options) > one.buffers_at_least(options)
    assert two.price(Options(gpu_layers=0)).device_bytes == 0


def test_a_projector_takes_its_size_and_something_to_compute_in(
    make: Make, tmp_path: Path, tiny: str
) -> None:
    file = write_sparse(
        tmp_path / "mmproj.gguf",
        {"general.architecture": ("string", "clip")},
        (("v.weight", (1024, 1024), 0),),
    )
    made = make(
        alone=LlamaServer(model=tiny), seeing=LlamaServer(model=tiny, args=("--mmproj", str(file)))
    )

    alone, seeing = (made.demand(name).price(ON_CARD) for name in ("alone", "seeing"))

    added_bytes = seeing.device_bytes - alone.device_bytes
    assert added_bytes == file.stat().st_size + 256 * MIB
    note = "multimodal projector: its compute buffer is a guess until it was measured"
    assert note in seeing.estimate.notes
    off = made.demand("seeing").price(Options(gpu_layers=0))
    assert (off.device_bytes, off.estimate.notes) == (0, ())


def test_a_projector_that_was_measured_is_not_guessed_any_more(tmp_path: Path, tiny: str) -> None:
    """Given one load, another choice of layers counts what the projector took in that."""
    metadata = {"general.architecture": ("string", "clip")}
    file = write_sparse(tmp_path / "mmproj.gguf", metadata, (("v.weight", (1024, 1024), 0),))
    known = [Ledger()]
    seeing = LlamaServer(model=tiny, args=("--mmproj", str(file)))
    profile = Profile(service={"seeing": seeing, "alone": LlamaServer(model=tiny)})
    made = Sizing(profile, os.environ, lambda: known[0], tmp_path / "engines.json")
    buffers = made.demand("seeing", reading=CARD).price(ON_CARD).estimate.device
    taken_bytes = buffers.total_bytes + (30 + 125) * MIB
    record = Record(buffers, buffers, taken_bytes, 0.0, extra_bytes=30 * MIB)
    known[0] = known[0].learn(made.key("seeing", ON_CARD, CARD), record)

    fewer = Options(gpu_layers=2, ctx_size=512)
    seeing_price, alone_price = (
        made.demand(name, reading=CARD).price(fewer) for name in ("seeing", "alone")
    )

    assert seeing_price.device_bytes - alone_price.device_bytes == 30 * MIB


def test_an_adapter_goes_with_the_layers(make: Make, tmp_path: Path, tiny: str) -> None:
    file = write_sparse(
        tmp_path / "lora.gguf",
        {"general.architecture": ("string", "qwen2"), "general.type": ("string", "adapter")},
        (("blk.0.ffn_up.weight.lora_a", (300, 1024), 0),),
    )
    made = make(
        alone=LlamaServer(model=tiny), tuned=LlamaServer(model=tiny, args=("--lora", str(file)))
    )

    def added_bytes(layers: int) -> int:
        options = Options(gpu_layers=layers, ctx_size=512)
        alone, tuned = (made.demand(name).price(options) for name in ("alone", "tuned"))
        return tuned.device_bytes - alone.device_bytes

    size_bytes = file.stat().st_size
    assert [added_bytes(layers) for layers in range(4)] == [
        0, -(-size_bytes // 3), -(-size_bytes * 2 // 3), size_bytes,
    ]  # fmt: skip


def test_a_companion_that_is_not_there_is_named(make: Make, tmp_path: Path, tiny: str) -> None:
    made = make(chat=LlamaServer(model=tiny, args=("--mmproj", str(tmp_path / "gone.gguf"))))

    with pytest.raises(ModelFileError, match=r"there is no .*gone\.gguf"):
        made.demand("chat")


def test_one_bad_file_leaves_the_others_planned(make: Make, tmp_path: Path, tiny: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(Path(tiny).read_bytes()[:-1000])
    made = make(
        chat=LlamaServer(model=tiny),
        code=LlamaServer(model=str(bad)),
        gone=LlamaServer(model="gone.gguf"),
        rag=Command(command=("sleep", "1")),
    )
    services = ("gateway", "chat", "code", "gone", "rag")

    assert made.models(services) == ("chat", "code", "gone")
    assert {name: error.flaw for name, error in made.flaws(services).items()} == {
        "code": Flaw.TRUNCATED,
        "gone": Flaw.MISSING,
    }
    assert [each.service for each in made.plan(CARD, services).placements] == ["chat"]


def test_what_has_no_model_makes_no_demand(make: Make) -> None:
    with pytest.raises(TypeError, match="rag has no model"):
        make(rag=Command(command=("sleep", "1"))).demand("rag")


def test_a_file_that_was_replaced_is_read_again(make: Make, tmp_path: Path) -> None:
    file = write_qwen(tmp_path / "model.gguf", TINY)
    made = make(chat=LlamaServer(model=str(file)))
    before = made.demand("chat").layers
    write_qwen(tmp_path / "other.gguf", QWEN_7B).replace(file)

    assert (before, made.demand("chat").layers) == (3, 29)


def test_what_ran_out_of_memory_gets_less_the_next_time(make: Make, tmp_path: Path) -> None:
    made = make(chat=LlamaServer(model=str(write_qwen(tmp_path / "3b.gguf", QWEN_3B))))
    plan = made.plan(CARD, ("chat",))
    first = plan.placements[0]

    second = made.plan(
        CARD, ("chat",), at_most_bytes={"chat": first.price.device_bytes - 1}
    ).placements[0]

    assert first.options.gpu_layers == 37
    assert 30 <= second.options.gpu_layers < 37


def test_without_a_card_the_reason_is_told(make: Make, tiny: str) -> None:
    plan = make(chat=LlamaServer(model=tiny, gpu_layers="all")).plan(NO_CARD, ("chat",))

    assert (plan.budget, plan.no_card, plan.refusal) == (None, NO_CARD.reason, "")
    assert plan.placements[0].price.device_bytes == 0
