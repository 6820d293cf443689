"""What is read of llama-server's log: a load, and an out-of-memory."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.diagnosis import Cause, Ending, diagnose
from llmsup.core.sizes import Sizes
from llmsup.services.llama_log import Effective, Part, Shortfall, parse, short_bytes, shortfall

MIB = 2**20


def mib(*numbers: float) -> list[int]:
    return [round(number * MIB) for number in numbers]


CUDA = """\
0.00.123.461 I cmn  common_param: common_params_print_info: build 11434 (c0ffee1) with GNU 12
0.00.859.339 I load_tensors: offloading output layer to GPU
0.00.859.349 I load_tensors: offloading 36 repeating layers to GPU
0.00.859.349 I load_tensors: offloaded 37/37 layers to GPU
0.00.859.360 I load_tensors:   CPU_Mapped model buffer size =   243.43 MiB
0.00.859.361 I load_tensors:        CUDA0 model buffer size =  1834.83 MiB
0.01.318.450 I llama_context: constructing llama_context
0.01.318.456 I llama_context: n_seq_max             = 1
0.01.318.457 I llama_context: n_ctx                 = 1024
0.01.318.457 I llama_context: n_ctx_seq             = 1024
0.01.318.457 I llama_context: n_batch               = 1024
0.01.318.458 I llama_context: n_ubatch              = 512
0.01.318.460 I llama_context: flash_attn            = auto
0.01.318.460 I llama_context: kv_unified            = false
0.01.318.520 I llama_context:  CUDA_Host  output buffer size =     0.58 MiB
0.01.318.641 I llama_kv_cache:      CUDA0 KV buffer size =    36.00 MiB
0.01.357.483 I resolve_fused_ops: Flash Attention enabled
0.01.374.132 I sched_reserve:      CUDA0 compute buffer size =    81.51 MiB
0.01.374.152 I sched_reserve:  CUDA_Host compute buffer size =    14.02 MiB
0.01.775.205 I srv  llama_server: model loaded
0.01.775.224 I srv  llama_server: listening on http://127.0.0.1:18932
"""
"""Qwen2.5-3B in full on a card."""


def test_a_load_on_a_card_tells_its_buffers_and_its_options() -> None:
    loaded = parse(CUDA.splitlines())
    weights, cache, compute = mib(1834.83, 36, 81.51)
    assert loaded.device == Sizes(weights, cache, compute)
    host_weights, output, host_compute = mib(243.43, 0.58, 14.02)
    assert loaded.host == Sizes(host_weights, 0, output + host_compute)
    assert loaded.effective == Effective(1024, 1024, 1024, 512, 1, False, True)
    assert (loaded.offloaded_layers, loaded.layers) == (37, 37)
    assert loaded.build == "11434 (c0ffee1)"
    assert loaded.devices == {"CUDA0"}
    assert loaded.is_complete


def test_the_prefix_does_not_matter_nor_that_the_log_is_json() -> None:
    told = parse(CUDA.splitlines())
    bare = [line[14:] for line in CUDA.splitlines()]
    as_json = [json.dumps({"type": "log", "level": "info", "msg": line}) for line in bare]
    assert parse(bare) == told
    assert parse(as_json) == told


def test_groups_of_a_cache_and_recurrent_states_are_added() -> None:
    more = """\
I llama_kv_cache:      CUDA0 KV buffer size =    16.00 MiB
I llama_kv_cache:      CUDA0 KV buffer size =    90.00 MiB
I llama_memory_recurrent:      CUDA0 RS buffer size =     2.50 MiB"""
    lines = [*CUDA.splitlines()[:-2], *more.splitlines()]
    assert parse(lines).device.kv_cache_bytes == sum(mib(36, 16, 90, 2.5))


def test_a_buffer_that_is_reserved_once_more_counts_once() -> None:
    again = "I sched_reserve:      CUDA0 compute buffer size =    90.00 MiB"
    assert parse([*CUDA.splitlines()[:-2], again]).device.compute_bytes == 90 * MIB


def test_a_second_context_and_a_draft_model_count_on_top() -> None:
    draft = """\
I load_tensors:        CUDA0 model buffer size =   100.00 MiB
I llama_context: constructing llama_context
I llama_context: n_ctx                 = 512
I llama_kv_cache:      CUDA0 KV buffer size =     8.00 MiB
I sched_reserve:      CUDA0 compute buffer size =    20.00 MiB
I llama_context: constructing llama_context
I sched_reserve:      CUDA0 compute buffer size =     5.00 MiB"""
    loaded = parse([*CUDA.splitlines()[:-2], *draft.splitlines()])
    assert loaded.device == Sizes(*mib(1934.83, 44, 106.51))
    assert loaded.effective.n_ctx == 1024


def test_what_a_fit_pass_tries_does_not_count() -> None:
    trial = [
        line.replace("1834.83", "0.00").replace("243.43", "0.00").replace("36.00", "72.00")
        for line in CUDA.splitlines()[:-2]
    ]
    assert parse([*trial, *trial, *CUDA.splitlines()]) == parse(CUDA.splitlines())
    assert not parse(trial).is_complete


def test_adapters_and_a_projector_are_told_apart() -> None:
    more = """\
I clip_ctx: CLIP using CUDA0 backend
I load_hparams: model size:         811.82 MiB
I reserve_compute_meta:      CUDA0 compute buffer size =   160.00 MiB
I reserve_compute_meta:        CPU compute buffer size =    15.00 MiB
I llama_adapter_lora_init_impl:      CUDA0 LoRA buffer size =     9.00 MiB"""
    plain = parse(CUDA.splitlines())
    loaded = parse([*more.splitlines(), *CUDA.splitlines()])
    assert loaded.extra_bytes == sum(mib(811.82, 160, 9))
    assert loaded.device == plain.device


def test_an_older_engine_says_it_otherwise() -> None:
    old = """\
build: 4567 (deadbeef) with cc
llm_load_tensors: offloaded 37/37 layers to GPU
llm_load_tensors:        CUDA0 model buffer size =  1834.83 MiB
llama_new_context_with_model: n_ctx      = 1024
llama_new_context_with_model: n_ctx_per_seq = 1024
llama_new_context_with_model: flash_attn = 0
llama_kv_cache_init:      CUDA0 KV buffer size =    36.00 MiB
llama_new_context_with_model:      CUDA0 compute buffer size =   304.00 MiB
llama_new_context_with_model:  CUDA_Host compute buffer size =     8.01 MiB
main: model loaded"""
    loaded = parse(old.splitlines())
    assert loaded.device == Sizes(*mib(1834.83, 36, 304))
    assert loaded.effective.n_ctx_seq == 1024
    assert loaded.effective.flash_attn is False
    assert loaded.build == "4567 (deadbeef)"


def test_half_a_load_is_not_complete() -> None:
    lines = CUDA.splitlines()
    assert not parse(lines[:16]).is_complete
    assert not parse([]).is_complete


def test_nothing_is_believed_after_the_model_is_loaded() -> None:
    forged = "load_tensors:        CUDA0 model buffer size =  9999.00 MiB"
    assert parse([*CUDA.splitlines(), forged]) == parse(CUDA.splitlines())


def test_megabytes_of_output_are_read_in_no_time() -> None:
    flood = ["x" * 5000 + " buffer size = "] * 2000
    assert not parse(flood).is_complete


@given(st.lists(st.text(max_size=80) | st.sampled_from(CUDA.splitlines()), max_size=40))
def test_no_output_upsets_it(lines: list[str]) -> None:
    loaded = parse(lines)
    assert loaded.device.total_bytes >= 0
    assert shortfall(lines).part in Part


CUDA_SAYS = "E ggml_backend_cuda_buffer_type_alloc_buffer"
CUDA_WHY = " on device 0: cudaMalloc failed: out of memory"
WEIGHTS = f"""\
{CUDA_SAYS}: allocating 4168.09 MiB{CUDA_WHY}
E alloc_tensor_range: failed to allocate CUDA0 buffer of size 4370566144
E llama_model_load: error loading model: unable to allocate CUDA0 buffer"""
KV_CACHE = f"""\
{CUDA_SAYS}: allocating 1792.00 MiB{CUDA_WHY}
E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"""
COMPUTE = f"""\
{CUDA_SAYS}: allocating 304.50 MiB{CUDA_WHY}
E ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 319291392
E llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers"""
RUNTIME = """\
E CUDA error: out of memory
E   current device: 0, in function alloc at ggml-cuda.cu:500
E   cuMemCreate(&handle, reserve_size, &prop, 0)"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (WEIGHTS, Shortfall(Part.WEIGHTS, 4370566144)),
        (KV_CACHE, Shortfall(Part.KV_CACHE, 1792 * MIB)),
        (COMPUTE, Shortfall(Part.COMPUTE, 319291392)),
        (RUNTIME, Shortfall(Part.RUNTIME)),
    ],
    ids=["weights", "kv cache", "compute", "run time"],
)
def test_an_out_of_memory_tells_what_was_missing(said: str, expected: Shortfall) -> None:
    lines = said.splitlines()
    assert diagnose(Ending("exited with 1", 1, lines=lines)).cause is Cause.GPU_MEMORY
    assert shortfall(lines) == expected


def test_a_host_buffer_that_cannot_be_had_is_no_amount_of_the_card() -> None:
    lines = ["E alloc_tensor_range: failed to allocate CPU buffer of size 4370566144"]
    assert shortfall(lines) == Shortfall(Part.UNKNOWN)


def test_what_was_missing_is_all_that_it_takes_up_to_there_less_what_was_free() -> None:
    """Given 100 MiB free and 30 of overhead, 180 more than the buffers so far was too much."""
    failed = "allocating 180.00 MiB on device 0: cudaMalloc failed: out of memory"
    lines = [*CUDA.splitlines(), failed]
    had_bytes = parse(lines).device.total_bytes

    assert short_bytes(lines, 30 * MIB, 100 * MIB) == had_bytes + (180 + 30 - 100) * MIB
    assert short_bytes(lines, 0, 99_999 * MIB) == 0  # somebody else came meanwhile
    assert short_bytes(["CUDA error: out of memory"], 30 * MIB, 100 * MIB) is None
