"""Causes of deaths, from what real servers said."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsup.core.advice import hint
from llmsup.core.diagnosis import (
    Cause,
    Ending,
    OomKills,
    diagnose,
    may_be_oom_kill,
    with_holder,
)

LLAMA = """\
0.00.001.656 I srv  llama_server: initializing ...
0.00.002.348 I cmn  common_param: common_params_print_info: verbosity = 3 (adjust with the `-lv N` \
CLI arg)
0.00.002.482 W srv  llama_server: security: no API key is set and CORS allows all origins (see \
https://github.com/ggml-org/llama.cpp/pull/25655)
0.00.004.351 I srv    load_model: loading model '/m.gguf'
{}
0.00.006.399 E llama_model_load_from_file_impl: failed to load model
0.00.006.401 E cmn  common_init_: failed to load model '/m.gguf'
0.00.006.404 E srv    load_model: failed to load model, '/m.gguf'
0.00.006.406 I srv    operator(): operator(): cleaning up before exit...
0.00.007.157 E srv  llama_server: exiting due to model loading error
"""
"""What llama-server writes around the line that tells."""

LOAD_FAILED = "0.00.004.485 E llama_model_load: error loading model: llama_model_loader: failed to \
load model from /m.gguf"


def failed_load(*said: str) -> Ending:
    lines = LLAMA.format("\n".join(said)).splitlines()
    return Ending("exited with status 1", code=1, lines=lines)


@pytest.mark.parametrize(
    ("said", "cause", "reason"),
    [
        pytest.param(
            "0.00.006.124 E gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such file "
            "or directory)",
            Cause.MODEL_MISSING,
            "model file missing: gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such "
            "file or directory)",
            id="missing",
        ),
        pytest.param(
            "0.00.004.196 E gguf_init_from_file: failed to open GGUF file '/m.gguf' (Permission "
            "denied)",
            Cause.MODEL_UNREADABLE,
            "model file not readable: gguf_init_from_file: failed to open GGUF file '/m.gguf' "
            "(Permission denied)",
            id="not readable",
        ),
        pytest.param(
            "0.00.004.291 E gguf_init_from_reader: failed to read magic",
            Cause.MODEL_CORRUPT,
            "model file corrupt: gguf_init_from_reader: failed to read magic",
            id="a directory, or empty",
        ),
        pytest.param(
            "0.00.004.068 E gguf_init_from_reader: failed to read header",
            Cause.MODEL_CORRUPT,
            "model file corrupt: gguf_init_from_reader: failed to read header",
            id="ten bytes of it",
        ),
        pytest.param(
            "0.00.004.186 E gguf_init_from_reader: failed to read key-value pairs",
            Cause.MODEL_CORRUPT,
            "model file corrupt: gguf_init_from_reader: failed to read key-value pairs",
            id="cut within the header",
        ),
        pytest.param(
            "0.00.032.640 E llama_model_load: error loading model: tensor 'blk.16.ffn_down.weight' "
            "data is not within the file bounds, model is corrupted or incomplete",
            Cause.MODEL_CORRUPT,
            "model file corrupt: llama_model_load: error loading model: tensor "
            "'blk.16.ffn_down.weight' data is not within the file bounds, model is corrupted or "
            "incomplete",
            id="cut within the data",
        ),
        pytest.param(
            "0.00.008.764 E gguf_init_from_reader: invalid magic characters: 'hell', expected "
            "'GGUF'",
            Cause.MODEL_CORRUPT,
            "model file corrupt: gguf_init_from_reader: invalid magic characters: 'hell', "
            "expected 'GGUF'",
            id="wrong magic",
        ),
        pytest.param(
            "0.00.004.305 E gguf_init_from_reader: this GGUF file is version 99 but this software "
            "only supports up to version 3\n"
            "0.00.004.315 E gguf_init_from_reader: failed to read header",
            Cause.MODEL_UNKNOWN,
            "model not known to this engine: gguf_init_from_reader: this GGUF file is version 99 "
            "but this software only supports up to version 3",
            id="a version to come",
        ),
        pytest.param(
            "0.00.004.125 E gguf_init_from_reader: GGUFv1 is no longer supported, please use a "
            "more up-to-date version\n"
            "0.00.004.135 E gguf_init_from_reader: failed to read header",
            Cause.MODEL_UNKNOWN,
            "model not known to this engine: gguf_init_from_reader: GGUFv1 is no longer "
            "supported, please use a more up-to-date version",
            id="a version of the past",
        ),
        pytest.param(
            "0.00.055.542 E llama_model_load: error loading model: unknown model architecture: "
            "'lxama'",
            Cause.MODEL_UNKNOWN,
            "model not known to this engine: llama_model_load: error loading model: unknown model "
            "architecture: 'lxama'",
            id="unknown architecture",
        ),
        pytest.param(
            "0.00.103.865 E llama_init_from_model: quantized V cache requires flash_attn to be "
            "enabled",
            Cause.BAD_FLAG,
            "bad flag: llama_init_from_model: quantized V cache requires flash_attn to be enabled",
            id="flags that contradict each other",
        ),
        pytest.param(
            "0.00.082.024 E llama_adapter_lora_init: failed to open '/nope.lora': No such file or "
            "directory",
            Cause.MODEL_MISSING,
            "model file missing: llama_adapter_lora_init: failed to open '/nope.lora': No such "
            "file or directory",
            id="a missing adapter",
        ),
        pytest.param(
            "0.00.096.482 E llama_model_load: error loading model: mmap failed: Cannot allocate "
            "memory",
            Cause.HOST_MEMORY,
            "out of memory: llama_model_load: error loading model: mmap failed: Cannot allocate "
            "memory",
            id="no memory for the weights",
        ),
        pytest.param(
            "0.00.093.096 E ggml_aligned_malloc: insufficient memory (attempted to allocate  "
            "11.25 MB)\n"
            "0.00.093.123 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer "
            "of size 11796480\n"
            "0.00.093.124 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate CPU "
            "buffer of size 11796480\n"
            "0.00.093.242 E llama_init_from_model: failed to initialize the context: failed to "
            "allocate buffer for kv cache",
            Cause.HOST_MEMORY,
            "out of memory: ggml_aligned_malloc: insufficient memory (attempted to allocate 11.25 "
            "MB)",
            id="no memory for the KV cache",
        ),
        pytest.param(
            "0.00.150.000 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on "
            "device 0: cudaMalloc failed: out of memory",
            Cause.GPU_MEMORY,
            "out of GPU memory: ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 "
            "MiB on device 0: cudaMalloc failed: out of memory",
            id="no memory on the card",
        ),
        pytest.param(
            "0.00.150.001 E alloc_tensor_range: unable to allocate CUDA0 buffer",
            Cause.GPU_MEMORY,
            "out of GPU memory: alloc_tensor_range: unable to allocate CUDA0 buffer",
            id="no buffer on the card",
        ),
        pytest.param(
            "0.00.150.001 E alloc_tensor_range: unable to allocate CUDA_Host buffer",
            Cause.HOST_MEMORY,
            "out of memory: alloc_tensor_range: unable to allocate CUDA_Host buffer",
            id="no pinned buffer beside the card",
        ),
    ],
)
def test_a_server_that_ended_by_itself(said: str, cause: Cause, reason: str) -> None:
    found = diagnose(failed_load(said, LOAD_FAILED))
    assert (found.cause, found.reason) == (cause, f"exited with status 1: {reason}")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("error: invalid argument: --foo", "bad flag: error: invalid argument: --foo"),
        (
            'error while handling argument "--ctx-size": stoi',
            'bad flag: error while handling argument "--ctx-size": stoi',
        ),
        (
            'error while handling argument "--cache-type-k": Unsupported cache type: q9_9',
            'bad flag: error while handling argument "--cache-type-k": Unsupported cache type: '
            "q9_9",
        ),
        (
            'error while handling argument "--ctx-size": expected value for argument',
            'bad flag: error while handling argument "--ctx-size": expected value for argument',
        ),
    ],
)
def test_a_bad_flag_is_permanent(said: str, reason: str) -> None:
    usage = (
        "\nusage:\n-c,    --ctx-size N                     size of the prompt context (default: 0, "
        "0 = loaded from model)\n                                        (env: LLAMA_ARG_CTX_SIZE)"
        "\n\n\nto show complete usage, run with -h"
    )
    found = diagnose(Ending("exited with status 1", 1, lines=f"{said}\n{usage}".splitlines()))
    assert (found.cause, found.is_permanent) == (Cause.BAD_FLAG, True)
    assert found.reason == f"exited with status 1: {reason}"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "llama-server: error while loading shared libraries: libllama-server-impl.so: cannot "
            "open shared object file: No such file or directory",
            Cause.LIBRARY_MISSING,
        ),
        (
            "llama-server: error while loading shared libraries: /lib/libllama.so.0: file too "
            "short",
            Cause.LIBRARY_BROKEN,
        ),
        (
            "llama-server: symbol lookup error: libllama-server-impl.so: undefined symbol: "
            "llama_max_devices",
            Cause.LIBRARY_BROKEN,
        ),
    ],
)
def test_the_dynamic_loader_ends_it_for_good(said: str, cause: Cause) -> None:
    found = diagnose(Ending("exited with status 127", 127, lines=[said]))
    assert (found.cause, found.is_permanent) == (cause, True)


def test_a_library_that_a_debugger_lacked_is_not_the_cause() -> None:
    """Given a server under a tight `ulimit -v` that aborts, gdb is called and fails, too."""
    lines = [
        "gdb: error while loading shared libraries: libicudata.so.72: failed to map segment from "
        "shared object",
        "terminate called after throwing an instance of 'std::system_error'",
        "  what():  Resource temporarily unavailable",
    ]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines))
    assert found.cause is Cause.CRASHED
    assert found.reason == "killed by SIGABRT: what(): Resource temporarily unavailable"


@pytest.mark.parametrize(
    ("said", "ports"),
    [
        (
            "0.00.002.442 E srv         start: couldn't bind HTTP server socket, hostname: "
            "127.0.0.1, port: 28098",
            (28098,),
        ),
        ("OSError: [Errno 98] Address already in use", ()),
        (
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 8002): "
            "address already in use",
            (8002,),
        ),
        ("cannot bind '127.0.0.1:8000': Address already in use", (8000,)),
    ],
)
def test_a_port_that_could_not_be_had_is_named_with_its_holder(
    said: str, ports: tuple[int, ...]
) -> None:
    ending = Ending("exited with status 1", 1, lines=[said])
    found = diagnose(ending)
    assert found.cause in {Cause.PORT_IN_USE, Cause.CANNOT_LISTEN}
    assert found.ports == ports
    held = with_holder(ending, "port 8002 is held by pid 12 (python rag.py)")
    assert held.cause is Cause.PORT_IN_USE
    assert held.reason == "exited with status 1: port 8002 is held by pid 12 (python rag.py)"


def test_an_address_that_is_not_of_this_machine_is_not_called_in_use() -> None:
    line = "0.00.003.455 E srv         start: couldn't bind HTTP server socket, hostname: 8.8.8.8, \
port: 28099"
    found = diagnose(Ending("exited with status 1", 1, lines=[line]))
    assert (found.cause, found.is_permanent) == (Cause.CANNOT_LISTEN, False)


def test_an_abort_at_run_time_for_gpu_memory() -> None:
    """The words are followed by the backtrace that ggml has a debugger print."""
    lines = [
        "CUDA error: out of memory",
        "  current device: 0, in function alloc at ggml-cuda.cu:503",
        "ggml-cuda.cu:98: CUDA error",
        *(f"#{number}  0x00007f in ggml_graph_compute ()" for number in range(100)),
    ]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines, was_ready=True))
    assert found.cause is Cause.GPU_MEMORY


@pytest.mark.parametrize(
    ("frame", "cause"),
    [
        ("libggml-cuda.so(_ZN18ggml_cuda_pool_vmm5allocEmPm+0x2a)[0x7f]", Cause.GPU_MEMORY),
        ("#5  0x00007f in ggml_cuda_pool_leg::alloc(unsigned long)", Cause.GPU_MEMORY),
        ("libggml-cuda.so(_Z22ggml_cuda_op_rms_normR25ggml_backend)[0x7f]", Cause.GPU_FAILED),
    ],
)
def test_an_abort_whose_words_were_lost_is_known_by_what_is_left(frame: str, cause: Cause) -> None:
    """The abort and the backtrace go to stderr, the error itself through the log's thread."""
    lines = ["/build/ggml/src/ggml-cuda/ggml-cuda.cu:98: CUDA error", frame]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines, was_ready=True))
    assert found.cause is cause


def test_an_illegal_access_that_an_allocation_comes_upon_is_none_of_memory() -> None:
    lines = ["CUDA error: an illegal memory access was encountered", "ggml_cuda_pool_vmm::alloc()"]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines, was_ready=True))
    assert found.cause is Cause.GPU_FAILED


def test_an_abort_for_another_trouble_of_the_gpu() -> None:
    lines = ["CUDA error: an illegal memory access was encountered", "#0  0x00007f in wait4 ()"]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines, was_ready=True))
    assert found.cause is Cause.GPU_FAILED
    assert found.reason.endswith("an illegal memory access was encountered")


def test_pinned_memory_that_was_done_without_is_no_cause() -> None:
    line = "0.00.1 W ggml_cuda_host_malloc: failed to allocate 96.00 MiB of pinned memory: out of \
memory"
    assert diagnose(Ending("killed by SIGSEGV", signal=11, lines=[line])).cause is Cause.CRASHED


def test_a_failed_assertion_is_the_reason_and_not_the_backtrace_below_it() -> None:
    lines = ["ggml.c:1234: GGML_ASSERT(a->ne[2] == b->ne[0]) failed", "#0  0x00007f in wait4 ()"]
    found = diagnose(Ending("killed by SIGABRT", signal=6, lines=lines))
    assert (found.cause, found.reason) == (
        Cause.CRASHED,
        "killed by SIGABRT: crashed: ggml.c:1234: GGML_ASSERT(a->ne[2] == b->ne[0]) failed",
    )


def test_what_was_ready_did_not_die_of_what_fails_a_start() -> None:
    """Given a server that logged a client's error and crashed much later."""
    lines = ["error: invalid argument: temperature", "decoding"]
    found = diagnose(Ending("killed by SIGSEGV", signal=11, lines=lines, was_ready=True))
    assert (found.cause, found.reason) == (Cause.CRASHED, "killed by SIGSEGV: decoding")


def test_a_kill_of_the_kernel_for_memory_is_told_from_one_by_hand() -> None:
    def killed(**kills: int | None) -> tuple[Cause, str]:
        oom_kills = OomKills(**kills)  # type: ignore[arg-type]
        found = diagnose(Ending("killed by SIGKILL", signal=9, oom_kills=oom_kills))
        return found.cause, found.reason

    assert killed() == (Cause.KILLED, "killed by SIGKILL")
    assert killed(group=1, machine=1, limit_bytes=3 * 2**30) == (
        Cause.HOST_MEMORY,
        "killed by SIGKILL: the kernel killed it for memory; its control group may use 3072 MiB",
    )
    assert killed(group=1, machine=1) == (
        Cause.HOST_MEMORY,
        "killed by SIGKILL: the kernel killed it, for the machine was out of memory",
    )
    assert killed(machine=1) == (
        Cause.HOST_MEMORY,
        "killed by SIGKILL: most likely by the kernel, which killed for memory at that time",
    )


def test_a_shell_tells_of_a_killed_command_by_its_own_status() -> None:
    found = diagnose(Ending("exited with status 137", 137, oom_kills=OomKills(group=1)))
    assert found.cause is Cause.HOST_MEMORY
    assert diagnose(Ending("exited with status 137", 137)).cause is Cause.KILLED
    assert [may_be_oom_kill(*end) for end in ((None, 9), (137, None), (None, None))] == [True] * 3
    assert not may_be_oom_kill(1, None)
    assert not may_be_oom_kill(None, 11)


def test_an_adopted_process_whose_status_is_not_known() -> None:
    words = "ended; its exit status is not known"
    found = diagnose(Ending(words, lines=["0.01.777.656 I srv  llama_server: listening on …"]))
    assert (found.cause, found.reason) == (Cause.UNKNOWN, words)
    oom = diagnose(Ending(words, lines=["CUDA error: out of memory"], was_ready=True))
    assert oom.cause is Cause.GPU_MEMORY


def test_an_illegal_instruction() -> None:
    found = diagnose(Ending("killed by SIGILL", signal=4, lines=["loading"]))
    assert (found.cause, found.is_permanent) == (Cause.ILLEGAL_INSTRUCTION, True)


def test_llama_server_that_was_told_to_end_exits_with_status_0() -> None:
    lines = [
        "0.00.136.419 I srv  llama_server: listening on http://127.0.0.1:28098",
        "0.01.496.461 I srv    operator(): operator(): cleaning up before exit...",
    ]
    found = diagnose(Ending("exited with status 0", 0, lines=lines, was_ready=True))
    assert found.cause is Cause.KILLED
    assert found.reason == "exited with status 0: it was told to end (SIGTERM or SIGINT)"
    assert diagnose(Ending("exited with status 0", 0, lines=["done"])).cause is Cause.EXITED


def test_anything_else_is_told_with_its_last_words() -> None:
    found = diagnose(Ending("exited with status 3", 3, lines=["starting", "no luck today", ""]))
    assert (found.cause, found.reason) == (Cause.EXITED, "exited with status 3: no luck today")
    found = diagnose(Ending("killed by SIGSEGV", signal=11, lines=["decoding"]))
    assert (found.cause, found.reason) == (Cause.CRASHED, "killed by SIGSEGV: decoding")


def test_of_llama_servers_last_errors_the_first_is_told_for_the_others_follow_from_it() -> None:
    found = diagnose(failed_load("0.00.005.000 E llama_model_load: something quite new"))
    assert found.cause is Cause.EXITED
    assert found.reason == "exited with status 1: llama_model_load: something quite new"


def test_every_permanent_cause_and_every_lack_of_memory_says_what_helps() -> None:
    for cause in Cause:
        assert "\n" not in hint(cause)
    for cause in (Cause.GPU_MEMORY, Cause.HOST_MEMORY, Cause.MODEL_CORRUPT, Cause.BAD_FLAG):
        assert hint(cause)
    assert "mapped" in hint(Cause.CRASHED, signal=7)


WORDS = st.sampled_from(
    [
        "failed to open ", "(No such file or directory)", "error: ", "invalid argument: ",
        "unable to allocate ", "failed to allocate ", "CUDA error: ", "GGML_ASSERT(", "port: ",
        "65536", "99999999999999", "address already in use", "couldn't bind HTTP server socket",
        "0.00.1 E ", "cleaning up before exit", "error while loading shared libraries: ",
        " buffer", "\x1b[31m", "gguf_init_from_reader", "é", "\u2028", "'", ", ",
    ]
)  # fmt: skip
LINES = st.lists(st.text(max_size=300) | st.lists(WORDS, max_size=8).map("".join), max_size=80)


@settings(deadline=None)
@given(
    st.builds(
        Ending,
        st.just("exited"),
        st.none() | st.integers(0, 255),
        st.none() | st.integers(1, 64),
        LINES,
        st.builds(
            OomKills, st.integers(0, 2), st.integers(0, 2), st.none() | st.integers(0, 2**70)
        ),
        st.booleans(),
    )
)
def test_every_ending_has_one_short_cause(ending: Ending) -> None:
    found = diagnose(ending)
    assert found.reason.startswith("exited")
    assert "\n" not in found.reason
    assert len(found.reason) < 300


@pytest.mark.parametrize(
    "hostile",
    ["failed to open " * 10_000, "port:" * 20_000, " buffer" * 10_000, "'" * 100_000,
     "gguf_init_from_reader" * 5_000, "0.0" * 30_000, "E " * 50_000],
)  # fmt: skip
def test_hostile_output_takes_no_time(hostile: str) -> None:
    """Lines of any length, each made for a pattern to stumble over: milliseconds, not minutes."""
    ending = Ending("exited with status 1", 1, lines=[hostile] * 1000)
    began = time.process_time()
    diagnose(ending)
    assert time.process_time() - began < 2.0
