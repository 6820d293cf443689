"""Causes of deaths, from what real servers said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.diagnosis import Cause, Ending, diagnose

LLAMA = """\
0.00.001.656 I srv  llama_server: initializing ...
{}
0.00.006.401 E cmn  common_init_: failed to load model '/m.gguf'
0.00.006.404 E srv    load_model: failed to load model, '/m.gguf'
0.00.006.406 I srv    operator(): operator(): cleaning up before exit...
0.00.007.157 E srv  llama_server: exiting due to model loading error
"""


@pytest.mark.parametrize(
    ("said", "cause", "reason"),
    [
        (
            "0.00.006.124 E gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such file "
            "or directory)",
            Cause.MODEL_MISSING,
            "model file missing: gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such "
            "file or directory)",
        ),
        (
            "0.00.032.640 E llama_model_load: error loading model: tensor 'blk.16.ffn_down.weight' "
            "data is not within the file bounds, model is corrupted or incomplete",
            Cause.MODEL_CORRUPT,
            "model file corrupt: llama_model_load: error loading model: tensor "
            "'blk.16.ffn_down.weight' data is not within the file bounds, model is corrupted or "
            "incomplete",
        ),
        (
            "0.00.008.764 E gguf_init_from_reader: invalid magic characters: 'hell', expected "
            "'GGUF'",
            Cause.MODEL_CORRUPT,
            "model file corrupt: gguf_init_from_reader: invalid magic characters: 'hell', "
            "expected 'GGUF'",
        ),
        (
            "0.00.055.542 E llama_model_load: error loading model: unknown model architecture: "
            "'lxama'",
            Cause.MODEL_UNKNOWN,
            "model not known to this engine: llama_model_load: error loading model: unknown model "
            "architecture: 'lxama'",
        ),
        (
            "0.00.150.000 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on "
            "device 0: cudaMalloc failed: out of memory",
            Cause.GPU_MEMORY,
            "out of GPU memory: ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 "
            "MiB on device 0: cudaMalloc failed: out of memory",
        ),
        (
            "0.00.004.939 E srv         start: couldn't bind HTTP server socket, hostname: "
            "127.0.0.1, port: 8001",
            Cause.PORT_IN_USE,
            "port in use: srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, "
            "port: 8001",
        ),
    ],
)
def test_a_server_that_ended_by_itself(said: str, cause: Cause, reason: str) -> None:
    lines = LLAMA.format(said).splitlines()
    found = diagnose(Ending("exited with status 1", code=1, lines=lines))
    assert (found.cause, found.reason) == (cause, f"exited with status 1: {reason}")


def test_a_bad_flag_is_permanent() -> None:
    found = diagnose(Ending("exited with status 1", 1, lines=["error: invalid argument: --foo"]))
    assert (found.cause, found.is_permanent) == (Cause.BAD_FLAG, True)


def test_a_missing_library() -> None:
    line = "llama-server: error while loading shared libraries: libcudart.so.12: cannot open"
    found = diagnose(Ending("exited with status 127", 127, lines=[line]))
    assert (found.cause, found.is_permanent) == (Cause.LIBRARY_MISSING, True)


def test_an_abort_at_run_time_for_gpu_memory() -> None:
    lines = ["CUDA error: out of memory", "  current device: 0, in function alloc at ggml-cuda.cu"]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines))
    assert found.cause is Cause.GPU_MEMORY


def test_a_kill_of_the_kernel_for_memory_is_told_from_one_by_hand() -> None:
    by_hand = diagnose(Ending("killed by SIGKILL", signal=9))
    by_kernel = diagnose(Ending("killed by SIGKILL", signal=9, oom_kills=1))
    assert (by_hand.cause, by_hand.reason) == (Cause.KILLED, "killed by SIGKILL")
    assert by_kernel.cause is Cause.HOST_MEMORY
    assert by_kernel.reason == "killed by SIGKILL: the kernel was out of memory"


def test_an_illegal_instruction() -> None:
    found = diagnose(Ending("killed by SIGILL", signal=4, lines=["loading"]))
    assert (found.cause, found.is_permanent) == (Cause.ILLEGAL_INSTRUCTION, True)


def test_anything_else_is_told_with_its_last_words() -> None:
    found = diagnose(Ending("exited with status 3", 3, lines=["starting", "no luck today", ""]))
    assert (found.cause, found.reason) == (Cause.EXITED, "exited with status 3: no luck today")
    found = diagnose(Ending("killed by SIGSEGV", signal=11, lines=["decoding"]))
    assert (found.cause, found.reason) == (Cause.CRASHED, "killed by SIGSEGV: decoding")


@given(
    st.builds(
        Ending,
        st.just("exited"),
        st.none() | st.integers(0, 255),
        st.none() | st.integers(1, 64),
        st.lists(st.text(max_size=300), max_size=80),
        st.integers(0, 3),
    )
)
def test_every_ending_has_one_short_cause(ending: Ending) -> None:
    found = diagnose(ending)
    assert found.reason.startswith("exited")
    assert "\n" not in found.reason
    assert len(found.reason) < 300
