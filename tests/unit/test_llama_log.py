"""What the log of a llama-server tells of its memory."""

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.sizes import Sizes
from llmsup.services.llama_log import (
    LINE_MAX_CHARS,
    Part,
    Shortfall,
    loaded,
    short_bytes,
    shortfall,
)

MIB = 2**20

LOAD = """\
0.00.304.013 I print_info: n_ctx_train           = 8192
0.00.326.653 I load_tensors: offloading output layer to GPU
0.00.326.663 I load_tensors: offloading 19 repeating layers to GPU
0.00.326.664 I load_tensors: offloaded 20/31 layers to GPU
0.00.326.673 I load_tensors:   CPU_Mapped model buffer size =    92.10 MiB
0.00.326.674 I load_tensors:        CUDA0 model buffer size =    68.89 MiB
0.00.423.831 I llama_context: n_seq_max             = 4
0.00.423.832 I llama_context: n_ctx                 = 2048
0.00.423.833 I llama_context: n_batch               = 2048
0.00.423.833 I llama_context: n_ubatch              = 512
0.00.423.835 I llama_context: kv_unified            = true
0.00.423.933 I llama_context:  CUDA_Host  output buffer size =     0.19 MiB
0.00.424.052 I llama_kv_cache:        CPU KV buffer size =    12.63 MiB
0.00.449.217 I llama_kv_cache:      CUDA0 KV buffer size =    21.83 MiB
0.00.449.301 I llama_kv_cache:      CUDA0 KV buffer size =     8.00 MiB
0.00.450.380 I resolve_fused_ops: Flash Attention enabled
0.00.462.788 I sched_reserve:      CUDA0 compute buffer size =    17.75 MiB
0.00.462.817 I sched_reserve:  CUDA_Host compute buffer size =     6.53 MiB
0.06.672.415 I srv  llama_server: listening on http://127.0.0.1:18991
""".splitlines()

NO_ROOM = (
    "E ggml_backend_cuda_buffer_type_alloc_buffer: "
    "allocating {} MiB on device 0: cudaMalloc failed: out of memory"
)
WEIGHTS = [
    NO_ROOM.format("92.17"),
    "E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
]
CACHE = [
    NO_ROOM.format("180.00"),
    "E llama_init_from_model: failed to initialize the context: "
    "failed to allocate buffer for kv cache",
]
COMPUTE = [
    NO_ROOM.format("96.50"),
    "E graph_reserve: failed to allocate compute buffers",
    "E llama_init_from_model: failed to initialize the context: "
    "failed to allocate compute pp buffers",
]
RUN_TIME = [
    "E CUDA error: out of memory",
    "E   current device: 0, in function alloc at ggml-cuda.cu:500",
]


def test_a_load_tells_its_buffers() -> None:
    """The cache comes in groups where some layers have a window; host and card are told apart."""
    found = loaded(LOAD)

    assert found.device == Sizes(round(68.89 * MIB), round(29.83 * MIB), round(17.75 * MIB))
    assert found.host == Sizes(
        round(92.10 * MIB), round(12.63 * MIB), round(0.19 * MIB) + round(6.53 * MIB)
    )
    assert (found.gpu_layers, found.layers, found.is_complete) == (20, 31, True)
    assert dict(found.told) == {
        "n_seq_max": 4, "n_ctx": 2048, "n_batch": 2048, "n_ubatch": 512, "kv_unified": 1,
    }  # fmt: skip
    assert found.has_flash_attention


def test_a_load_in_thought_before_the_real_one_is_passed_over() -> None:
    """With --fit on the engine prints the same lines first, and nothing was allocated."""
    thought = [line.replace("68.89", "0.00").replace("17.75", "99.00") for line in LOAD]

    assert loaded([*thought, *LOAD]) == loaded(LOAD)


def test_a_load_that_ended_early_is_not_complete() -> None:
    ends = [loaded(LOAD[:count]).is_complete for count in range(len(LOAD))]

    assert ends.index(True) == len(LOAD) - 2  # with the compute buffer of the card
    assert not loaded([]).is_complete


def test_attention_that_the_card_cannot_do_is_noticed() -> None:
    line = "W resolve_fused_ops: Flash Attention not supported, set to disabled"

    assert not loaded([*LOAD, line]).has_flash_attention


def test_what_failed_is_told_by_how_the_engine_goes_on() -> None:
    assert shortfall(WEIGHTS) == Shortfall(Part.WEIGHTS, round(92.17 * MIB))
    assert shortfall(CACHE) == Shortfall(Part.KV_CACHE, 180 * MIB)
    assert shortfall(COMPUTE) == Shortfall(Part.COMPUTE, round(96.5 * MIB))
    assert shortfall(RUN_TIME) == Shortfall(Part.RUN_TIME, None)
    assert shortfall(LOAD) is None


def test_what_was_missing_is_all_that_it_takes_up_to_there_less_what_was_free() -> None:
    """Given 100 MiB free, 30 of overhead and 98.72 of buffers, 180 more is 208.72 too much."""
    until_cache = LOAD[:15]
    had_bytes = loaded(until_cache).device.total_bytes

    missing = short_bytes([*until_cache, *CACHE], 30 * MIB, 100 * MIB)

    assert missing == had_bytes + (180 + 30 - 100) * MIB
    assert short_bytes([*until_cache, *CACHE], 0, 4000 * MIB) == 0  # somebody else came
    assert short_bytes(RUN_TIME, 30 * MIB, 100 * MIB) is None
    assert short_bytes(LOAD, 30 * MIB, 100 * MIB) is None


LINES = st.one_of(
    st.text(),
    st.sampled_from([*LOAD, *WEIGHTS, *CACHE, *COMPUTE, *RUN_TIME]),
    st.builds(
        "x CUDA0 KV buffer size = {} MiB".format, st.from_regex(r"[0-9.e+-]*", fullmatch=True)
    ),
)


@given(st.lists(LINES, max_size=40))
def test_any_output_is_read(lines: list[str]) -> None:
    found = loaded(lines)

    assert min(found.device.total_bytes, found.host.total_bytes) >= 0
    failed = shortfall(lines)
    assert failed is None or failed.needed_bytes is None or failed.needed_bytes >= 0
    missing = short_bytes(lines, 0, 0)
    assert missing is None or missing >= 0


def test_only_the_beginning_of_a_line_is_looked_at() -> None:
    assert loaded(["x" * LINE_MAX_CHARS + LOAD[5]]).device == Sizes()
