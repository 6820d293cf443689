"""The estimate of what a llama-server takes, where no measured cell says it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsup.core.estimate import buffers_at_least, estimate, off_card, pool_bytes
from llmsup.core.estimate.compute import compute_bytes
from llmsup.core.estimate.effective import effective
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape, shape_of
from llmsup.core.sizes import Basis, Estimate
from tests.gguf_files import Entry
from tests.model_shapes import PUBLISHED, model_of, published

MIB = 1024 * 1024
SHAPES = {name: shape_of(published(name)) for name in PUBLISHED}
ALL = 999

some_options = st.builds(
    Options,
    gpu_layers=st.integers(0, 50),
    n_cpu_moe=st.integers(0, 50),
    ctx_size=st.integers(1, 40_000),
    parallel=st.integers(1, 8),
    kv_unified=st.booleans(),
    cache_type_k=st.sampled_from(["f16", "q8_0", "q4_0"]),
    cache_type_v=st.sampled_from(["f16", "q8_0"]),
    ubatch=st.sampled_from([16, 128, 512]),
    pooled=st.booleans(),
    kv_offload=st.booleans(),
    swa_full=st.booleans(),
)
some_shape = st.sampled_from(sorted(SHAPES)).map(SHAPES.__getitem__)


def require_sound(result: Estimate) -> None:
    for sizes in (result.device, result.host):
        for size in (sizes.weights_bytes, sizes.kv_cache_bytes, sizes.compute_bytes):
            assert 0 <= size < 2**80
    assert sum(each.device_bytes for each in result.items) == result.device.total_bytes
    assert sum(each.host_bytes for each in result.items) == result.host.total_bytes
    assert all(each.device_bytes >= 0 and each.host_bytes >= 0 for each in result.items)


def test_qwen_3b_in_full_is_what_was_measured_on_a_card() -> None:
    device = estimate(SHAPES["qwen2.5-3b"], Options(gpu_layers=37, ctx_size=1024)).device
    assert round(device.weights_bytes / MIB, 2) == 1834.83
    assert device.kv_cache_bytes == 36 * MIB


@given(some_shape, some_options)
@settings(max_examples=60, deadline=None)
def test_the_items_add_up_and_nothing_is_negative(shape: ModelShape, options: Options) -> None:
    result = estimate(shape, options)
    require_sound(result)
    assert result.basis is Basis.GRAPH
    assert result.notes == ()
    least = result.device.weights_bytes + result.device.kv_cache_bytes
    assert buffers_at_least(shape, options) == least


@given(some_shape, some_options, st.integers(1, 40_000))
@settings(max_examples=60, deadline=None)
def test_a_longer_context_never_needs_a_smaller_cache(
    shape: ModelShape, options: Options, more: int
) -> None:
    longer = replace(options, ctx_size=options.ctx_size + more)
    assert buffers_at_least(shape, longer) >= buffers_at_least(shape, options)
    host, longer_host = off_card(shape, options).host, off_card(shape, longer).host
    assert longer_host.kv_cache_bytes >= host.kv_cache_bytes


some_dense_shape = st.sampled_from(
    [shape for shape in SHAPES.values() if not shape.has_experts and shape.traits.is_causal]
)


@given(some_dense_shape, some_options, st.integers(1, 40_000))
@settings(max_examples=60, deadline=None)
def test_a_longer_context_never_needs_less_of_the_card_where_all_is_on_it(
    shape: ModelShape, options: Options, more: int
) -> None:
    whole = replace(options, gpu_layers=ALL, n_cpu_moe=0, kv_offload=True)
    longer = replace(whole, ctx_size=whole.ctx_size + more)
    shorter = estimate(shape, whole).device.total_bytes
    assert estimate(shape, longer).device.total_bytes >= shorter


@given(some_shape, some_options, st.integers(1, 40_000))
@settings(max_examples=60, deadline=None)
def test_a_longer_context_needs_less_only_by_what_a_better_fit_saves(
    shape: ModelShape, options: Options, more: int
) -> None:
    # The engine's allocator is like that: see docs/vram.md. The cache itself never shrinks.
    longer = replace(options, ctx_size=options.ctx_size + more)
    device, longer_device = estimate(shape, options).device, estimate(shape, longer).device
    assert longer_device.kv_cache_bytes >= device.kv_cache_bytes
    assert longer_device.total_bytes >= device.total_bytes - 128 * MIB


@given(some_shape, some_options)
@settings(max_examples=60, deadline=None)
def test_one_more_layer_never_needs_smaller_buffers_for_weights_and_cache(
    shape: ModelShape, options: Options
) -> None:
    fewer = replace(options, gpu_layers=min(options.gpu_layers, shape.layers - 1))
    more = replace(fewer, gpu_layers=fewer.gpu_layers + 1)
    assert buffers_at_least(shape, more) >= buffers_at_least(shape, fewer)


@given(some_shape, some_options)
@settings(max_examples=20, deadline=None)
def test_a_few_of_equal_layers_stand_for_all_of_them(shape: ModelShape, options: Options) -> None:
    chosen = effective(shape, options)
    whole, _ = compute_bytes(shape, chosen, whole=True)
    assert abs(compute_bytes(shape, chosen)[0] - whole) <= 16 * MIB


def test_no_layer_on_the_card_still_takes_a_compute_buffer_there() -> None:
    device = estimate(SHAPES["qwen2.5-7b"], Options(gpu_layers=0)).device
    assert device.weights_bytes == device.kv_cache_bytes == 0
    assert device.compute_bytes > 50 * MIB


def test_a_process_without_a_card_takes_nothing_of_it() -> None:
    result = off_card(SHAPES["qwen2.5-7b"], Options(gpu_layers=14))
    require_sound(result)
    assert result.device.total_bytes == 0
    assert result.host.weights_bytes > 4000 * MIB
    assert pool_bytes(SHAPES["qwen2.5-7b"], Options(gpu_layers=0)) == 0


def test_the_items_say_what_goes_where() -> None:
    options = Options(gpu_layers=ALL, n_cpu_moe=30, ctx_size=8192)
    whats = [each.what for each in estimate(SHAPES["qwen3-30b-a3b"], options).items]
    assert "output layer" in whats
    assert "layers 0 to 47" in whats
    assert "experts of layers 0 to 29" in whats
    assert "KV cache of 48 layers × 8192 tokens, f16" in whats
    assert "copy of the largest tensor on the host" in whats


def test_a_sliding_window_is_named_beside_its_cells() -> None:
    options = Options(gpu_layers=ALL, ctx_size=8192, cache_type_k="q8_0")
    whats = [each.what for each in estimate(SHAPES["gemma-3-1b"], options).items]
    assert "KV cache of 22 layers × 1024 tokens, q8_0/f16, a window of 512" in whats
    assert "KV cache of 4 layers × 8192 tokens, q8_0/f16" in whats


def test_without_op_offload_nothing_is_copied_to_the_card() -> None:
    with_it = Options(gpu_layers=14)
    without = replace(with_it, op_offload=False)
    shape = SHAPES["qwen2.5-7b"]
    assert (
        estimate(shape, without).device.compute_bytes
        < estimate(shape, with_it).device.compute_bytes
    )


ODD: dict[str, tuple[dict[str, Any], list[Entry]]] = {
    "nothing at all": ({"general.name": "x"}, []),
    "an architecture and no more": ({"general.architecture": "llama"}, []),
    "two bogus tensors": (
        {"general.architecture": "llama", "llama.block_count": 2},
        [("blk.0.attn_norm.weight", (4,), 0), ("blk.1.bogus", (4, 4), 0)],
    ),
    "no heads": (
        {
            "general.architecture": "qwen2",
            "qwen2.block_count": 1,
            "qwen2.embedding_length": 64,
            "qwen2.attention.head_count": 0,
        },
        [("token_embd.weight", (64, 100), 0), ("blk.0.attn_q.weight", (64, 64), 0)],
    ),
    "an architecture of the future": (
        {
            "general.architecture": "qwen9",
            "qwen9.block_count": 2,
            "qwen9.embedding_length": 64,
            "qwen9.attention.head_count": 4,
            "qwen9.attention.head_count_kv": 2,
        },
        [("token_embd.weight", (64, 100), 0), ("blk.0.attn_q.weight", (64, 64), 0)],
    ),
    "absurd numbers": (
        {
            "general.architecture": "llama",
            "llama.block_count": 4_000_000_000,
            "llama.embedding_length": 4_000_000_000,
            "llama.attention.head_count": 2_000_000_000,
            "llama.attention.key_length": 2_000_000_000,
        },
        [("blk.0.attn_q.weight", (64, 64), 0)],
    ),
    "a tensor without a shape": (
        {"general.architecture": "gemma3", "gemma3.block_count": 1},
        [("blk.0.ffn_up.weight", (), 0), ("output.weight", (5,), 0)],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_model_gets_a_sound_estimate_and_no_error(name: str) -> None:
    shape = shape_of(model_of(*ODD[name]))
    for layers in (0, 1, ALL):
        require_sound(estimate(shape, Options(gpu_layers=layers)))
        require_sound(off_card(shape, Options(gpu_layers=layers)))


def test_an_unknown_architecture_is_said_to_be_a_bound() -> None:
    result = estimate(
        shape_of(model_of(*ODD["an architecture of the future"])), Options(gpu_layers=1)
    )
    assert result.basis is Basis.BOUND
    assert any('"qwen9"' in note for note in result.notes)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_bound_is_above_what_the_engine_takes(name: str) -> None:
    model = published(name)
    known = shape_of(model)
    metadata = {
        key.replace(f"{known.architecture}.", "future."): value
        for key, value in model.metadata.items()
    } | {"general.architecture": "future"}
    plain = {key: list(each) if isinstance(each, tuple) else each for key, each in metadata.items()}
    shape = shape_of(model_of(plain, [(t.name, t.shape, t.type_id) for t in model.tensors]))
    for options in (
        Options(gpu_layers=ALL, ctx_size=8192),
        Options(gpu_layers=8, ctx_size=8192, cache_type_k="q8_0", cache_type_v="q8_0"),
        Options(gpu_layers=8, ctx_size=8192, kv_offload=False),
        Options(gpu_layers=ALL, ctx_size=4096, flash_attn="off"),
    ):
        bound, truth = estimate(shape, options), estimate(known, options)
        assert bound.basis is Basis.BOUND
        assert bound.device.compute_bytes >= truth.device.compute_bytes
        assert bound.device.weights_bytes >= truth.device.weights_bytes


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "block_count",
                "embedding_length",
                "attention.head_count",
                "attention.key_length",
                "attention.head_count_kv",
                "attention.sliding_window",
                "expert_used_count",
                "nextn_predict_layers",
                "ssm.state_size",
                "attention.kv_lora_rank",
                "attention.key_length_mla",
                "ssm.conv_kernel",
                "attention.shared_kv_layers",
            ]
        ),
        st.integers(0, 2**32 - 1) | st.integers(0, 8),
    ),
    st.sampled_from(["llama", "gemma3", "deepseek2", "mamba2", "qwen35", "bert", "gpt-oss", ""]),
    st.sampled_from([0, 1, ALL]),
)
@settings(max_examples=150, deadline=None)
def test_any_metadata_gives_a_sound_estimate(
    numbers: dict[str, int], architecture: str, layers: int
) -> None:
    numbers["block_count"] = numbers.get("block_count", 1) % 6
    metadata: dict[str, Any] = {f"{architecture}.{key}": each for key, each in numbers.items()}
    metadata["general.architecture"] = architecture
    names = ("attn_q", "ffn_gate_inp", "ffn_down_exps", "ssm_in", "attn_kv_a_mqa")
    tensors: list[Entry] = [(f"blk.0.{name}.weight", (64, 64), 0) for name in names]
    tensors.append(("token_embd.weight", (64, 100), 0))
    require_sound(estimate(shape_of(model_of(metadata, tensors)), Options(gpu_layers=layers)))
