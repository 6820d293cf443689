"""Who gets how much of the card: the rules one by one, then what always holds."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsup.core.offload import insists_on, plan
from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Demand, Knob, Placement, Plan
from tests.demands import MIB, Model, budget, everything, exhaustive, fixed

SMALL = Model()  # 200 for the output layer, 10 layers of 108, 170 and 40 beside them: 1450 in all
WHOLE_MIB = 1450
LADDER = (Degrade.CACHE_TYPE, Degrade.UBATCH, Degrade.CTX_SIZE)


def only(made: Plan) -> Placement:
    (placement,) = made.placements
    return placement


def layers(made: Plan) -> dict[str, int]:
    return {each.service: each.options.gpu_layers for each in made.placements}


# One service


def test_everything_goes_on_the_card_when_there_is_room() -> None:
    placement = only(plan(budget(WHOLE_MIB), [SMALL.demand()]))

    assert placement.options == Options(gpu_layers=11)
    assert placement.reason == "all 11 layers"
    assert placement.next_bytes is None


def test_one_layer_less_says_what_it_would_take() -> None:
    made = plan(budget(1250), [SMALL.demand()])

    # All layers on the card stage nothing: the last one takes less than the others.
    assert layers(made) == {"chat": 8}
    assert only(made).reason == "8 of 11 layers: one more takes 108 MiB, 84 MiB are left"
    assert only(made).next_bytes == 108 * MIB
    assert made.left_bytes == 84 * MIB


def test_the_last_layer_may_be_free() -> None:
    model = Model(staged=500)
    demand = model.demand()
    room = budget(WHOLE_MIB)

    assert model.price(replace(demand.asked, gpu_layers=10)).device_bytes > room.usable_bytes
    assert layers(plan(room, [demand])) == {"chat": 11}


def test_nothing_fits_and_says_what_the_first_layer_would_take() -> None:
    made = plan(budget(300), [SMALL.demand()])

    placement = only(made)
    assert placement.options.gpu_layers == 0
    assert placement.price.device_bytes == 0
    assert placement.reason == (
        "on the CPU: the output layer alone takes 410 MiB, 300 MiB are left"
    )
    assert not made.refusal


def test_after_an_out_of_memory_it_gets_strictly_less() -> None:
    for_all = SMALL.demand(at_most_bytes=WHOLE_MIB * MIB)

    placement = only(plan(budget(5000), [for_all]))

    assert placement.options.gpu_layers == 10
    assert placement.price.device_bytes < WHOLE_MIB * MIB
    assert placement.reason == (
        "10 of 11 layers: one more takes 68 MiB, with which it ran out of memory"
    )


@pytest.mark.parametrize("at_most_bytes", [0, 1, 2])
def test_off_the_card_is_always_left(at_most_bytes: int) -> None:
    placement = only(plan(budget(5000), [SMALL.demand(at_most_bytes=at_most_bytes)]))

    assert placement.options.gpu_layers == 0


# Experts


MOE = Model(layer=20, output=250, experts=330, layers=49, cache=16, staged=100)


def test_experts_go_to_the_host_before_a_layer_does() -> None:
    placement = only(plan(budget(5500), [MOE.demand()]))

    assert (placement.options.gpu_layers, placement.options.n_cpu_moe) == (49, 39)
    assert placement.next_bytes == 330 * MIB
    assert placement.reason.startswith(
        "all 49 layers, experts of the first 39 of 48 on the CPU: the experts of one more take"
    )


def test_fewer_layers_only_with_all_experts_on_the_host() -> None:
    placement = only(plan(budget(1000), [MOE.demand()]))

    assert placement.options.n_cpu_moe == 48
    assert 0 < placement.options.gpu_layers < 49
    assert "all experts on the CPU" in placement.reason


def test_off_the_card_there_is_no_word_of_experts() -> None:
    assert only(plan(budget(10), [MOE.demand()])).options.n_cpu_moe == 0


def test_a_fixed_number_of_experts_is_kept() -> None:
    demand = MOE.demand(knobs=frozenset({Knob.GPU_LAYERS}))
    demand = replace(demand, asked=replace(demand.asked, n_cpu_moe=40))

    full = only(plan(budget(9000), [demand]))
    less = only(plan(budget(3000), [demand]))

    assert (full.options.gpu_layers, full.options.n_cpu_moe) == (49, 40)
    assert less.options.n_cpu_moe == 40
    assert less.options.gpu_layers < 49


def test_experts_may_be_chosen_where_the_layers_are_fixed() -> None:
    placement = only(plan(budget(5500), [fixed(MOE.demand(), 49)]))

    assert (placement.options.gpu_layers, placement.options.n_cpu_moe) == (49, 39)


# What is taken for layers


def test_nothing_is_taken_where_everything_fits() -> None:
    placement = only(plan(budget(WHOLE_MIB), [SMALL.demand(degrade=LADDER)]))

    assert placement.options == Options(gpu_layers=11)


def test_the_mildest_rung_that_keeps_all_layers_is_taken() -> None:
    demand = SMALL.demand(degrade=LADDER, ctx_size_min=1024)

    placement = only(plan(budget(WHOLE_MIB - 10), [demand]))

    assert placement.options == Options(gpu_layers=11, cache_type_k="q8_0", cache_type_v="q8_0")
    assert placement.reason == "all 11 layers, with q8_0 cache to keep 1 more layer"


def test_rungs_come_in_the_order_of_the_profile() -> None:
    demand = SMALL.demand(degrade=(Degrade.CTX_SIZE, Degrade.UBATCH), ctx_size_min=3000)

    placement = only(plan(budget(WHOLE_MIB - 40), [demand]))

    assert placement.options == Options(gpu_layers=11, ctx_size=3000, ubatch=256)


def test_the_context_never_falls_below_its_least() -> None:
    demand = SMALL.demand(degrade=(Degrade.CTX_SIZE,), ctx_size_min=3000)

    for room_mib in range(300, WHOLE_MIB, 50):
        assert only(plan(budget(room_mib), [demand])).options.ctx_size >= 3000


def test_the_context_is_kept_where_the_profile_tells_no_least() -> None:
    demand = SMALL.demand(degrade=(Degrade.CTX_SIZE,))

    assert only(plan(budget(1000), [demand])).options.ctx_size == 4096


def test_values_are_not_narrowed_without_flash_attention() -> None:
    demand = SMALL.demand(degrade=(Degrade.CACHE_TYPE,))
    demand = replace(demand, asked=replace(demand.asked, flash_attn="off"))

    placement = only(plan(budget(1400), [demand]))

    assert (placement.options.cache_type_k, placement.options.cache_type_v) == ("f16", "f16")


def test_a_cache_that_the_engine_refuses_is_not_part_of_later_rungs() -> None:
    def price(options: Options) -> object:
        if options.cache_type_v == "q8_0":
            raise ValueError("its heads are no multiple of 32")
        return SMALL.price(options)

    demand = SMALL.demand(degrade=(Degrade.CACHE_TYPE, Degrade.UBATCH), price=price)

    placement = only(plan(budget(WHOLE_MIB - 10), [demand]))

    assert placement.options == Options(gpu_layers=11, ubatch=256)


def test_a_text_to_embed_is_not_cut_shorter() -> None:
    demand = SMALL.demand(degrade=(Degrade.UBATCH,))
    demand = replace(demand, asked=replace(demand.asked, pooled=True))

    assert only(plan(budget(1440), [demand])).options.ubatch == 512


# Several services


def test_a_higher_priority_is_served_first() -> None:
    made = plan(budget(2500), [SMALL.demand("code"), SMALL.demand("chat", priority=1)])

    assert layers(made) == {"chat": 11, "code": 6}


def test_pinned_comes_before_any_priority() -> None:
    pinned = SMALL.demand("embedding", pinned=True)

    made = plan(budget(1800), [SMALL.demand("chat", priority=9), pinned])

    assert layers(made) == {"embedding": 11, "chat": 0}
    assert made.placements[0].reason == "all 11 layers, because it is pinned"


def test_a_pinned_service_is_never_shrunk() -> None:
    made = plan(budget(WHOLE_MIB - 1), [SMALL.demand(pinned=True)])

    assert made.refused == ("chat",)
    assert made.refusal == "chat: all 11 layers take 1450 MiB, 1449 MiB are usable; 1 MiB too much"
    assert made.hint == "set gpu_layers = 10 in [service.chat], or pinned = false"


def test_a_pinned_service_keeps_its_experts() -> None:
    made = plan(budget(5500), [MOE.demand(pinned=True)])

    assert made.refused == ("chat",)
    assert (
        made.hint == "set gpu_layers = 49 and n_cpu_moe = 39 in [service.chat], or pinned = false"
    )


def test_a_fixed_number_is_kept_free_from_higher_ranks() -> None:
    code = fixed(SMALL.demand("code"), 6)  # 950 MiB

    made = plan(budget(2000), [code, SMALL.demand("chat", priority=9)])

    assert layers(made) == {"chat": 6, "code": 6}
    assert made.of("code") is not None
    assert made.placements[1].reason == "6 of 11 layers, as the profile says"
    assert made.left_bytes >= 0


def test_automatic_services_shrink_to_nothing_before_a_plan_is_refused() -> None:
    made = plan(budget(950), [fixed(SMALL.demand("code"), 6), SMALL.demand("chat", priority=9)])

    assert layers(made) == {"chat": 0, "code": 6}
    assert not made.refusal


def test_what_cannot_fit_anyway_pushes_nobody_off() -> None:
    code = fixed(SMALL.demand("code"), 6)
    chat = SMALL.demand("chat", priority=9)

    made = plan(budget(900), [code, chat, SMALL.demand("last", priority=-1)])
    alone = plan(budget(900), [chat])

    assert layers(made)["chat"] == layers(alone)["chat"] == 5
    assert made.refused == ("code",)
    assert made.left_bytes < 0
    assert made.placements[1].reason == "does not fit: 50 MiB too much"


def test_a_refusal_shows_who_came_first_and_what_would_fit() -> None:
    code = fixed(SMALL.demand("code"), 9)
    chat = fixed(SMALL.demand("chat", priority=9), 11)

    made = plan(budget(2500), [code, chat])

    assert made.refusal == (
        "code: 9 of 11 layers take 1274 MiB, 1050 MiB are usable after chat (1450 MiB); "
        "224 MiB too much"
    )
    assert made.hint == 'set gpu_layers = 6 in [service.code], or gpu_layers = "auto"'
    assert layers(plan(budget(2500), [replace(code, asked=Options(gpu_layers=6)), chat])) == {
        "chat": 11,
        "code": 6,
    }


def test_a_lower_fixed_service_that_fits_is_placed_beside_a_refused_one() -> None:
    made = plan(
        budget(900),
        [fixed(SMALL.demand("big", priority=9), 11), fixed(SMALL.demand("little"), 3)],
    )

    assert made.refused == ("big",)
    assert made.placements[1].reason == "3 of 11 layers, as the profile says"


def test_a_fixed_service_that_ran_out_of_memory_is_refused_with_that() -> None:
    at_most_bytes = 950 * MIB
    made = plan(budget(5000), [fixed(SMALL.demand(at_most_bytes=at_most_bytes), 6)])

    assert made.refusal == "chat: 6 of 11 layers take 950 MiB, with which it ran out of memory"
    assert made.hint == 'set gpu_layers = 5 in [service.chat], or gpu_layers = "auto"'


def test_a_refusal_tells_the_least_that_the_ladder_allows() -> None:
    demand = fixed(SMALL.demand(degrade=LADDER, ctx_size_min=4096), 11)

    made = plan(budget(1300), [demand])

    assert made.refusal == (
        "chat: all 11 layers take at least 1372 MiB, 1300 MiB are usable; 72 MiB too much"
    )


def test_options_that_the_engine_refuses_are_told_in_its_words() -> None:
    def price(options: Options) -> object:
        raise ValueError("quantised values need flash attention")

    made = plan(budget(5000), [fixed(SMALL.demand(price=price), 6)])

    assert made.refusal == "chat: quantised values need flash attention"
    assert made.refused == ("chat",)


def test_equals_share_evenly_and_pass_on_what_they_cannot_use() -> None:
    small = Model(layers=3).demand("small")  # 586 MiB in all

    made = plan(budget(3000), [SMALL.demand("a"), SMALL.demand("b"), small])

    assert layers(made) == {"a": 8, "b": 8, "small": 3}
    assert made.left_bytes == (3000 - 586 - 2 * 1166) * MIB


def test_no_equal_starves_the_other() -> None:
    assert layers(plan(budget(1500), [SMALL.demand("a"), SMALL.demand("b")])) == {"a": 4, "b": 4}


def test_a_share_that_is_too_little_for_a_first_layer_goes_to_the_others_evenly() -> None:
    big = Model(output=1000).demand("0-big")

    assert layers(plan(budget(1900), [big, SMALL.demand("a"), SMALL.demand("b")])) == {
        "0-big": 0,
        "a": 6,
        "b": 6,
    }


def test_what_is_too_little_for_two_goes_to_the_first_name() -> None:
    assert layers(plan(budget(500), [SMALL.demand("b"), SMALL.demand("a")])) == {"a": 1, "b": 0}


def test_bytes_kept_for_others_are_not_used() -> None:
    made = plan(budget(1250, reserved_mib=700), [SMALL.demand()])

    assert layers(made) == {"chat": 8}


# Without a card


def test_without_a_card_the_automatic_go_to_the_cpu_and_the_fixed_stay() -> None:
    demands = [
        SMALL.demand("chat"),
        fixed(SMALL.demand("code"), 6),
        SMALL.demand("embedding", pinned=True),
    ]

    made = plan(None, demands, no_card="no driver is installed")

    assert layers(made) == {"embedding": 0, "chat": 0, "code": 6}
    assert made.no_card == "no driver is installed"
    assert made.left_bytes == 0
    assert all(each.reason for each in made.placements)
    assert not made.refusal


# What a demand insists on


def test_an_automatic_service_insists_on_nothing() -> None:
    assert insists_on(SMALL.demand()) == 0


def test_a_fixed_or_pinned_service_insists_on_what_it_takes() -> None:
    assert insists_on(fixed(SMALL.demand(), 6)) == 950 * MIB
    assert insists_on(SMALL.demand(pinned=True)) == WHOLE_MIB * MIB


def test_it_insists_on_the_least_that_its_ladder_allows() -> None:
    demand = fixed(SMALL.demand(degrade=LADDER, ctx_size_min=1024), 6)

    assert insists_on(demand) == min(taken for _, taken in everything(demand))


def test_it_insists_on_nothing_that_it_may_not_have() -> None:
    assert insists_on(fixed(SMALL.demand(at_most_bytes=950 * MIB), 6)) == 0


# How much is asked


@pytest.mark.parametrize("degrade", [(), LADDER])
def test_few_prices_are_asked_for(degrade: tuple[Degrade, ...]) -> None:
    for room_mib in range(0, 6000, 197):
        models = {
            "chat": Model(layer=46, output=250, layers=37),
            "code": Model(layer=130, output=420, layers=29),
            "moe": Model(layer=20, output=250, experts=330, layers=49),
            "tiny": Model(layer=6, output=30, layers=31, cache=2),
        }
        plan(
            budget(room_mib),
            [
                model.demand(name, priority=-index, degrade=degrade, ctx_size_min=1024)
                for index, (name, model) in enumerate(models.items())
            ],
        )
        for name, model in models.items():
            assert max(model.asked.values(), default=0) <= 1, name
            assert len(model.asked) <= (12 if degrade else 6), (name, room_mib)


# What always holds


@st.composite
def any_demand(draw: st.DrawFn, service: str, priority: int, *, required: bool) -> Demand:
    """A small model with a price table that follows no rule above its lower bound."""
    count = draw(st.integers(1, 4))
    model = Model(
        layer=draw(st.integers(0, 200)),
        output=draw(st.integers(0, 300)),
        experts=draw(st.sampled_from([0, 0, 90])) if count <= 3 else 0,
        layers=count,
        compute=draw(st.integers(0, 100)),
        staged=draw(st.integers(0, 300)),
    )
    extras = draw(st.lists(st.integers(0, 400), min_size=7, max_size=7))
    model.extra = lambda options: extras[
        (3 * options.gpu_layers + 5 * options.n_cpu_moe + options.ubatch // 128) % 7
    ]
    demand = model.demand(service, priority=priority)
    if len(everything(demand)) <= 3 and draw(st.booleans()):  # 1 + 2 * 3 choices then
        demand = replace(demand, degrade=(Degrade.UBATCH,))
    if draw(st.integers(0, 3)) == 0:
        demand = replace(demand, at_most_bytes=draw(st.integers(0, 1200)) * MIB)
    if required and draw(st.booleans()):
        if draw(st.booleans()):
            return replace(demand, pinned=True)
        return fixed(demand, draw(st.integers(0, count)))
    return demand


@st.composite
def any_demands(draw: st.DrawFn, *, required: bool = True, equals: bool = True) -> list[Demand]:
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    ranks = st.integers(0, 2) if equals else st.nothing()
    return [
        draw(any_demand(name, draw(ranks) if equals else index, required=required))
        for index, name in enumerate(names)
    ]


ROOMS = st.integers(0, 3500)


@settings(max_examples=300)
@given(any_demands(), ROOMS)
def test_a_plan_never_exceeds_what_is_usable(demands: list[Demand], room_mib: int) -> None:
    made = plan(budget(room_mib), demands)

    placed = [each for each in made.placements if each.service not in made.refused]
    assert sum(each.price.device_bytes for each in placed) <= room_mib * MIB
    assert bool(made.refused) == bool(made.refusal)
    assert made.left_bytes >= 0 or made.refusal


@settings(max_examples=100)
@given(any_demands(), ROOMS, st.randoms())
def test_the_order_of_services_changes_nothing(
    demands: list[Demand], room_mib: int, random: object
) -> None:
    shuffled = list(demands)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert plan(budget(room_mib), demands) == plan(budget(room_mib), shuffled)


@settings(max_examples=300)
@given(any_demands(equals=False), ROOMS)
def test_it_agrees_with_a_search_through_everything(demands: list[Demand], room_mib: int) -> None:
    best = exhaustive(room_mib * MIB, demands)
    made = plan(budget(room_mib), demands)

    if best is None:
        assert made.refusal
    else:
        assert not made.refusal
        assert {each.service: each.options for each in made.placements} == best


def rank(placement: Placement) -> tuple[int, int, int]:
    return placement.options.gpu_layers, -placement.options.n_cpu_moe, placement.options.ubatch


@settings(max_examples=300)
@given(any_demands(required=False, equals=False), ROOMS, st.integers(0, 600))
def test_more_memory_never_gives_a_higher_rank_less(
    demands: list[Demand], room_mib: int, more_mib: int
) -> None:
    """What a lower one loses, a higher one got."""
    less = plan(budget(room_mib), demands)
    more = plan(budget(room_mib + more_mib), demands)

    assert list(map(rank, less.placements)) <= list(map(rank, more.placements))


@settings(max_examples=300)
@given(any_demands(required=False), ROOMS)
def test_equals_get_no_less_than_an_even_share_alone_would_give(
    demands: list[Demand], room_mib: int
) -> None:
    equals = [replace(each, priority=0) for each in demands]
    room = budget(room_mib)
    together = plan(room, equals)
    taken_by_others = room.usable_bytes - room.usable_bytes // len(equals)
    share = replace(room, reserved_bytes=taken_by_others)

    for each in equals:
        alone = only(plan(share, [each]))
        got = together.of(each.service)
        assert got is not None
        assert rank(got) >= rank(alone)


@settings(max_examples=300)
@given(any_demands(), ROOMS)
def test_every_placement_has_a_reason_and_every_refusal_adds_up(
    demands: list[Demand], room_mib: int
) -> None:
    made = plan(budget(room_mib), demands)

    assert all(each.reason for each in made.placements)
    arithmetic = re.search(
        r"take (?:at least )?(\d+) MiB, (\d+) MiB are usable(?: after (.*))?; (\d+) MiB too much",
        made.refusal,
    )
    if arithmetic is not None:
        needed, usable, after, excess = arithmetic.groups()
        assert int(needed) - int(usable) == int(excess) > 0
        others = sum(map(int, re.findall(r"\((\d+) MiB\)", after or "")))
        assert int(usable) + others == room_mib
    for each in made.placements:
        figures = re.search(r"takes? (\d+) MiB, (\d+) MiB are left", each.reason)
        if figures is not None:
            assert int(figures[1]) > int(figures[2])


@settings(max_examples=100)
@given(any_demands(), ROOMS)
def test_the_same_question_has_the_same_answer(demands: list[Demand], room_mib: int) -> None:
    assert plan(budget(room_mib), demands) == plan(budget(room_mib), demands)


@given(any_demands(required=False))
def test_all_is_on_the_card_where_there_is_room(demands: list[Demand]) -> None:
    made = plan(budget(20_000), [replace(each, at_most_bytes=None) for each in demands])

    assert all(each.options.gpu_layers == each.layers for each in made.placements)
    assert all(each.options.n_cpu_moe == 0 for each in made.placements)


@settings(max_examples=100)
@given(st.integers(5, 60), st.integers(1, 150), st.integers(0, 400), st.integers(0, 400), ROOMS)
def test_with_any_size_of_layers_no_fitting_number_is_missed(
    count: int, layer_mib: int, output_mib: int, staged_mib: int, room_mib: int
) -> None:
    model = Model(layer=layer_mib, output=output_mib, layers=count, staged=staged_mib)
    demand = model.demand()

    best = next(options for options, taken in everything(demand) if taken <= room_mib * MIB)

    assert only(plan(budget(room_mib), [demand])).options == best


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 900), min_size=10, max_size=40),
    st.integers(0, 40),
    st.integers(0, 100),
    ROOMS,
)
def test_no_dip_of_the_price_is_missed_where_gaps_rise_and_fall_once(
    gaps: list[int], peak: int, layer_mib: int, room_mib: int
) -> None:
    """Steps that are cheaper than the one below them, anywhere."""
    peak = min(peak, len(gaps))
    gaps = sorted(gaps[:peak]) + sorted(gaps[peak:], reverse=True)
    model = Model(layer=layer_mib, layers=len(gaps), cache=0)
    model.extra = lambda options: gaps[options.gpu_layers - 1]
    demand = replace(model.demand(), at_most_bytes=None)

    made = only(plan(budget(room_mib), [demand]))

    best = next(options for options, taken in everything(demand) if taken <= room_mib * MIB)
    assert made.options == best
