"""Plans of published models on a card of 6141 MiB, priced by the estimator itself."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from llmsup.core.offload import plan
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Degrade, Demand, Price
from tests.demands import MIB, everything, of_published

LADDER = (Degrade.CACHE_TYPE, Degrade.UBATCH, Degrade.CTX_SIZE)
SIX = ("nomic-v1.5", "qwen2.5-3b", "qwen2.5-7b", "qwen3-30b-a3b", "llama-3.2-1b", "gemma-3-4b")


def laptop(free_mib: int = 5800) -> Budget:
    return Budget(
        device_name="NVIDIA GeForce RTX 4050 Laptop GPU",
        total_bytes=6141 * MIB,
        free_bytes=free_mib * MIB,
        headroom_bytes=256 * MIB,
        ceiling_bytes=6141 * MIB * 95 // 100,
    )


def dual(*, degrade: tuple[Degrade, ...] = ()) -> tuple[Demand, Demand]:
    chat = of_published("qwen2.5-3b", "chat", ctx_size=4096)
    code = of_published("qwen2.5-7b", "code", ctx_size=8192)
    return replace(chat, priority=10), replace(code, degrade=degrade, ctx_size_min=2048)


def best_of(demand: Demand, room_bytes: int) -> Options:
    return next(options for options, taken in everything(demand) if taken <= room_bytes)


@pytest.mark.parametrize("free_mib", [5800, 5200, 4600, 4000, 3400])
@pytest.mark.parametrize("degrade", [(), LADDER[:2]])
def test_all_of_chat_and_the_most_of_code_that_any_search_finds(
    free_mib: int, degrade: tuple[Degrade, ...]
) -> None:
    budget = laptop(free_mib)
    chat, code = dual(degrade=degrade)

    made = plan(budget, [code, chat])

    placed_chat, placed_code = made.placements
    assert placed_chat.options.gpu_layers == chat.layers == 37
    room_bytes = budget.usable_bytes - placed_chat.price.device_bytes
    assert placed_code.options == best_of(code, room_bytes)
    assert made.left_bytes >= 0
    taken = sum(each.price.device_bytes for each in made.placements)
    assert budget.free_bytes - taken >= budget.headroom_bytes


def test_a_model_of_experts_keeps_all_its_layers_on_a_small_card() -> None:
    demand = of_published("qwen3-30b-a3b", "moe", ctx_size=8192)

    (placement,) = plan(laptop(), [demand]).placements

    assert placement.options.gpu_layers == demand.layers == 49
    assert 0 < placement.options.n_cpu_moe < 48
    assert placement.options == best_of(demand, laptop().usable_bytes)


@pytest.mark.parametrize("name", SIX)
def test_every_model_gets_the_best_choice_whatever_is_free(name: str) -> None:
    demand = of_published(name, "model", ctx_size=8192)
    choices = everything(demand)

    for free_mib in range(300, 6141, 173):
        budget = laptop(free_mib)
        (placement,) = plan(budget, [demand]).placements

        best = next(options for options, taken in choices if taken <= budget.usable_bytes)
        assert placement.options == best, free_mib


@pytest.mark.parametrize("are_equal", [False, True])
@pytest.mark.parametrize("degrade", [(), LADDER])
def test_six_models_are_planned_with_few_prices(
    degrade: tuple[Degrade, ...], *, are_equal: bool
) -> None:
    asked: Counter[str] = Counter()

    def counted(demand: Demand) -> Callable[[Options], Price]:
        def price(options: Options) -> Price:
            asked[demand.service] += 1
            return demand.price(options)

        return price

    demands = []
    for rank, name in enumerate(SIX):
        demand = of_published(name, name, ctx_size=8192)
        priority = 0 if are_equal else -rank
        demand = replace(demand, degrade=degrade, ctx_size_min=2048, priority=priority)
        demands.append(replace(demand, price=counted(demand)))

    for free_mib in range(1000, 6141, 500):
        asked.clear()
        assert not plan(laptop(free_mib), demands).refusal

        assert max(asked.values()) <= (20 if are_equal else 12), asked
        assert asked.total() <= (80 if are_equal else 50), asked
