"""Which saved slots a server gets back, and which are worth saving."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.schema import LlamaServer
from llmsup.core import warmth
from llmsup.core.gguf import joined
from llmsup.core.gguf_header import parse
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape, shape_of
from llmsup.core.warmth import FREE_MIN_BYTES, SIZE_MAX_BYTES, Saved
from llmsup.services.launch import Launch
from llmsup.services.llama_help import Flags
from llmsup.services.llama_server import launch
from tests.gguf_files import SMALL, header

HOUR_S = 3600.0
SLOT = Saved("chat-a-0", "chat", "a", 0, 100, 5000, 1000.0, 1000.0 + HOUR_S, (1, 2, 3, 4))


def shape() -> ModelShape:
    written, data_bytes = header(SMALL)
    parsed = parse(written, len(written) + data_bytes)
    assert parsed is not None
    return shape_of(joined([parsed]))


@pytest.mark.parametrize(
    ("now_time", "is_usable"),
    [(1000.0, True), (4599.0, True), (4600.0, False), (10_000.0, False), (999.0, False)],
)
def test_it_is_good_for_its_hour_and_not_before_it(now_time: float, is_usable: bool) -> None:
    """Given a clock that was set back, it is not known how old it is."""
    assert warmth.usable([SLOT], "a", now_time) == ((SLOT,) if is_usable else ())
    assert warmth.kept([SLOT], {"chat"}, now_time) == ((SLOT,) if is_usable else ())


def test_only_what_the_very_same_server_saved_is_given_back_the_longest_first() -> None:
    longer, other = replace(SLOT, slot=1, tokens=200), replace(SLOT, key="b")
    assert warmth.usable([SLOT, other, longer], "a", 2000.0) == (longer, SLOT)


def test_a_service_that_has_gone_keeps_nothing() -> None:
    assert warmth.kept([SLOT], {"code"}, 2000.0) == ()


def test_it_is_there_only_where_the_server_had_all_of_it() -> None:
    tokens = range(100)
    assert warmth.is_shown(tokens, 100)
    assert warmth.is_shown(tokens, 99), "the last one is computed for what follows it"
    assert not warmth.is_shown(tokens, 98)
    assert not warmth.is_shown(tokens, 0)


def test_a_disk_is_not_filled_up() -> None:
    assert warmth.fits(1000, FREE_MIN_BYTES + 1000)
    assert not warmth.fits(1000, FREE_MIN_BYTES + 999)
    assert not warmth.fits(SIZE_MAX_BYTES + 1, 2**50)


@given(st.integers(1, 8), st.integers(1, 4096))
def test_a_file_is_at_least_as_large_as_its_keys_and_values(parallel: int, tokens: int) -> None:
    small = shape()
    options = Options(0, ctx_size=4096, parallel=parallel)
    block = small.blocks[0]
    row = block.kv_heads * (block.key_length + block.value_length) * 2
    size = warmth.size_bytes(small, options, tokens)
    assert len(small.blocks) * row * tokens <= size
    assert size <= warmth.size_bytes(small, options, 4096)


def test_layers_that_attend_to_a_window_begin_anew_but_with_all_of_the_cache() -> None:
    options = Options(0)
    small = shape()
    first, *others = small.blocks
    windowed = replace(small, blocks=(replace(first, window=512), *others))
    assert warmth.comes_back(small, options)
    assert not warmth.comes_back(windowed, options)
    assert warmth.comes_back(windowed, replace(options, swa_full=True))


# --- what a launch says of it


def launched(tmp: str = "/slots", flags: Flags | None = None, **keys: object) -> Launch:
    spec = LlamaServer(model="/m/chat.gguf", **keys)  # type: ignore[arg-type]
    return launch(
        spec, name="chat", binary="llama-server", port=8001, flags=flags, slot_directory=Path(tmp)
    )


def test_a_server_is_told_where_to_save_its_slots() -> None:
    made = launched()
    assert made.argv[made.argv.index("--slot-save-path") + 1] == "/slots"
    assert made.slots is not None
    assert made.slots.keep_s == HOUR_S


@pytest.mark.parametrize(
    "keys",
    [
        {"warm_for_s": 0.0},
        {"args": ("--slot-save-path", "/mine")},
        {"args": ("--slot_save_path", "/mine")},
        {"args": ("--embeddings",)},
        {"flags": Flags(frozenset({"--model", "--port", "--ctx-size"}))},
    ],
)
def test_one_that_cannot_or_should_not_is_not(keys: dict[str, object]) -> None:
    made = launched(**keys)  # type: ignore[arg-type]
    assert made.slots is None
    assert "/slots" not in made.argv


def test_what_is_on_the_card_makes_no_difference_to_a_prompt_cache_and_the_rest_does() -> None:
    def essence(**keys: object) -> str:
        slots = launched(**keys).slots  # type: ignore[arg-type]
        assert slots is not None
        return slots.essence

    assert essence(gpu_layers=0) == essence(gpu_layers=20, n_cpu_moe=3)
    others = [
        essence(**{key: value})
        for key, value in {
            "ctx_size": 8192,
            "parallel": 2,
            "cache_type_k": "q8_0",
            "args": ("--lora", "a.gguf"),
            "env": {"GGML_CUDA_FORCE_MMQ": "1"},
        }.items()
    ]
    assert len({essence(), *others}) == len(others) + 1
