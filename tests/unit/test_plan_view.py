"""What `llmsup plan` prints, as whole texts, of plans made by hand."""

from dataclasses import replace

import pytest

from llmsup.cli import plan_view
from llmsup.cli.card_bar import shares
from llmsup.core.options import Options
from llmsup.core.plan import Placement, Plan
from llmsup.core.sizes import Basis, Item
from tests.plans import CARD, CHAT, CODE, DUAL, MIB, price

ON_THE_HOST = Placement(
    "embedding",
    "nomic.gguf",
    13,
    Options(gpu_layers=0, ctx_size=2048),
    price(0, 0, 0, 0, host=140),
    "",
)


def test_two_models_on_a_laptop_card() -> None:
    assert plan_view.text(DUAL, width=80) == (
        "RTX 4050 Laptop GPU · 6141 MiB · 5800 free\n"
        "█████████████████████████████▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓░▒▒▒····\n"
        "█ chat 2199  ▓ code 3314  ░ left 31  ▒ headroom 256  · other programs 341\n"
        "\n"
        "SERVICE  MODEL               LAYERS  CONTEXT  WEIGHTS   KV  COMPUTE  TOTAL  HOST\n"
        "chat     Qwen2.5-3B-Inst…  37 of 37     4096     1835  144       84   2199   243\n"
        "code     qwen2.5-coder-7…  19 of 29     8192     2815  153      190   3314  1650\n"
        "\n"
        "chat: all 37 layers\n"
        "code: 19 of 29 layers: one more takes 142 MiB, 31 MiB are left"
    )


def test_in_a_pipe_nothing_is_cut() -> None:
    heading, chat, code = plan_view.text(DUAL).splitlines()[4:7]

    assert " ".join(heading.split()) == (
        "SERVICE MODEL LAYERS CONTEXT CACHE WEIGHTS KV COMPUTE OVERHEAD TOTAL HOST"
    )
    assert "Qwen2.5-3B-Instruct-Q4_K_M " in chat
    assert code.split()[-7:] == ["q8_0", "2815", "153", "190", "156", "3314", "1650"]


@pytest.mark.parametrize("width", range(40, 140, 3))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for line in plan_view.text(DUAL, width=width).splitlines():
        assert len(line) <= max(width, 42)  # the line that names the card is not cut


def test_a_terminal_without_unicode_gets_other_characters_in_the_same_places() -> None:
    shown = plan_view.text(DUAL, width=80)
    plain = plan_view.in_ascii(shown)

    assert plain.isascii()
    assert [len(line) for line in plain.splitlines()] == [len(x) for x in shown.splitlines()]


def test_colours_change_no_column() -> None:
    plain = plan_view.text(DUAL, width=80)
    coloured = plan_view.text(DUAL, width=80, colour=True)

    assert "\x1b[32m█████" in coloured
    assert "\x1b[32m█\x1b[0m chat 2199" in coloured
    for code in ("0", "1", "2", "32", "36"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain


def test_the_ceiling_is_named_where_it_is_what_binds() -> None:
    """Given other programs above 5 %, the ceiling leaves more free than the headroom does."""
    held = replace(CARD, ceiling_bytes=5834 * MIB)

    assert "▒ above the ceiling 307 " in plan_view.text(Plan((CHAT,), held))


def test_a_service_off_the_card_has_no_part_of_the_bar() -> None:
    _, bar, legend, *rest = plan_view.text(Plan((CHAT, ON_THE_HOST), CARD)).splitlines()

    assert "▓" not in bar
    assert "embedding" not in legend
    assert any(line.split()[:5] == ["embedding", "nomic", "0", "of", "13"] for line in rest)


def test_without_a_card_the_table_is_of_the_host() -> None:
    plan = Plan((ON_THE_HOST,), None, no_card="no NVIDIA driver is installed")

    assert plan_view.text(plan) == (
        "no GPU: no NVIDIA driver is installed; everything runs on the CPU\n"
        "\n"
        "SERVICE    MODEL  CONTEXT  CACHE  WEIGHTS  KV  COMPUTE  TOTAL\n"
        "embedding  nomic     2048  f16        140   -        -    140"
    )


def test_experts_on_the_host_have_a_column_of_their_own() -> None:
    experts = replace(CODE, options=replace(CODE.options, gpu_layers=29, n_cpu_moe=12))

    assert "EXPERTS" not in plan_view.text(DUAL)
    lines = plan_view.text(Plan((CHAT, experts), CARD)).splitlines()

    assert "29 of 29  12 on host" in lines[6]
    assert "37 of 37           - " in lines[5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(1, ctx_size=8192), "8192"),
        (Options(1, ctx_size=8192, parallel=4), "4×2048"),
        (Options(1, ctx_size=8192, parallel=4, kv_unified=True), "4 in 8192"),
    ],
)
def test_the_context_of_slots(options: Options, words: str) -> None:
    assert plan_view.context(options) == words


def test_two_cache_types_are_both_named() -> None:
    mixed = replace(CODE, options=replace(CODE.options, cache_type_v="f16"))

    assert "q8_0/f16" in plan_view.text(Plan((mixed,), CARD))


def test_an_upper_bound_is_called_one_until_it_was_measured() -> None:
    guessed = replace(CHAT, price=price(1000, 100, 300, 130, basis=Basis.BOUND, notes=("odd",)))
    known = replace(guessed, price=replace(guessed.price, is_measured=True))

    assert plan_view.text(Plan((guessed,), CARD)).endswith(
        "note: chat: an upper bound: its architecture is not known here\nnote: chat: odd"
    )
    assert "upper bound" not in plan_view.text(Plan((known,), CARD))


def test_verbose_says_what_an_estimate_consists_of() -> None:
    items = (Item("layers 0 to 35", 1600 * MIB, 0), Item("token embeddings", 0, int(243.4 * MIB)))
    chat = replace(CHAT, price=price(1600, 0, 0, 135.7, host=243.4, items=items))

    assert plan_view.text(Plan((chat,), CARD), is_verbose=True).endswith(
        "chat, by estimate              CARD   HOST\n"
        "  layers 0 to 35             1600.0      -\n"
        "  token embeddings                -  243.4\n"
        "  driver: context and pools   135.7      -\n"
        "  total                      1735.7  243.4"
    )


def test_verbose_names_the_buffers_of_an_estimate_that_names_nothing() -> None:
    assert plan_view.text(Plan((CHAT,), CARD), is_verbose=True).endswith(
        "chat, by estimate              CARD   HOST\n"
        "  weights                    1834.8  243.4\n"
        "  KV cache                    144.0      -\n"
        "  compute buffer               83.5      -\n"
        "  driver: context and pools   135.7      -\n"
        "  total                      2198.0  243.4"
    )


def test_what_was_measured_is_not_explained_by_an_estimate() -> None:
    items = (Item("layers", 1 * MIB, 0),)
    chat = replace(CHAT, price=price(1600, 100, 80, 135, items=items, is_measured=True))

    shown = plan_view.text(Plan((chat,), CARD), is_verbose=True)

    assert "chat, as measured at a load before" in shown
    assert "layers  " not in shown.partition("as measured")[2]
    assert "  weights " in shown


def test_what_was_refused_is_in_the_table_and_not_on_the_card() -> None:
    refused = replace(CODE, price=price(5000, 100, 190, 130))
    plan = Plan((CHAT, refused), CARD, "too much", hint="less", refused=("code",))

    _, bar, legend, *rest = plan_view.text(plan, width=80).splitlines()

    assert len(bar) == 80
    assert "code" not in legend
    assert "░ left 3345" in legend
    assert any(line.startswith("code ") and " 5420 " in line for line in rest)
    assert "\x1b[31mcode " in plan_view.text(plan, colour=True)


def test_text_of_files_cannot_upset_the_terminal() -> None:
    odd = replace(CHAT, model="a\x1b[2Jb.gguf", reason="be\x07ep", price=price(1, 1, 1, 1))

    assert plan_view.text(Plan((odd,), CARD)).replace("\n", "").isprintable()


def test_services_share_the_bar_by_size_and_the_smallest_is_still_seen() -> None:
    assert shares([50, 50], 10) == [5, 5]
    assert shares([1, 10_000, 1], 10) == [1, 8, 1]
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([5, 5, 5, 5], 2) == [1, 1, 1, 1]
