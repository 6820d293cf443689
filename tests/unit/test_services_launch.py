import json
from pathlib import Path
from typing import Any

from llmsup.config.schema import Command, LlamaServer, Qdrant, Readiness
from llmsup.core.options import Options
from llmsup.services import command, llama_server, qdrant
from llmsup.services.launch import Launch, Target, Via
from llmsup.services.llama_help import Flags


def llama(
    spec: LlamaServer,
    options: Options | None = None,
    device: str | None = None,
    flags: Flags | None = None,
) -> Launch:
    return llama_server.launch(
        spec,
        name="chat",
        binary="/opt/llama-server",
        port=8001,
        options=options,
        device=device,
        flags=flags,
    )


def test_llama_server_without_a_plan_stays_off_the_card() -> None:
    launch = llama(LlamaServer(model="/models/qwen.gguf"))

    assert " ".join(launch.argv) == (
        "/opt/llama-server --host 127.0.0.1 --port 8001 --model /models/qwen.gguf --alias chat"
        " --offline --gpu-layers 0 --device none --n-cpu-moe 0 --fit off --ctx-size 4096"
        " --parallel 1 --no-kv-unified --batch-size 2048 --ubatch-size 512 --cache-type-k f16"
        " --cache-type-v f16 --flash-attn auto --metrics"
    )
    assert launch.target == Target(Via.HTTP, port=8001, path="/health")
    assert launch.ports == (8001,)
    assert launch.env == {"CUDA_VISIBLE_DEVICES": ""}
    assert launch.cwd is None


def test_llama_server_of_a_service_that_sets_everything() -> None:
    launch = llama(
        LlamaServer(
            model="/models/moe.gguf",
            gpu_layers=20,
            ctx_size=8192,
            parallel=4,
            cache_type_k="q8_0",
            cache_type_v="q4_0",
            batch=1024,
            ubatch=256,
            flash_attn="on",
            kv_unified=True,
            n_cpu_moe=7,
            args=("--no-warmup", "--threads", "2"),
            env={"CUDA_VISIBLE_DEVICES": "0"},
        )
    )

    assert " ".join(launch.argv) == (
        "/opt/llama-server --host 127.0.0.1 --port 8001 --model /models/moe.gguf --alias chat"
        " --offline --gpu-layers 20 --n-cpu-moe 7 --fit off --ctx-size 8192"
        " --parallel 4 --kv-unified --batch-size 1024 --ubatch-size 256 --cache-type-k q8_0"
        " --cache-type-v q4_0 --flash-attn on --metrics --no-warmup --threads 2"
    )
    assert launch.env == {"CUDA_VISIBLE_DEVICES": "0"}


def test_llama_server_is_told_what_was_planned() -> None:
    planned = Options(
        gpu_layers=12,
        n_cpu_moe=3,
        ctx_size=2048,
        parallel=2,
        kv_unified=True,
        cache_type_k="q8_0",
        cache_type_v="q8_0",
        batch=512,
        ubatch=128,
        flash_attn="on",
    )
    launch = llama(LlamaServer(model="/m.gguf"), planned, device="GPU-1")

    assert " ".join(launch.argv).endswith(
        "--gpu-layers 12 --n-cpu-moe 3 --fit off --ctx-size 2048 --parallel 2 --kv-unified"
        " --batch-size 512 --ubatch-size 128 --cache-type-k q8_0 --cache-type-v q8_0"
        " --flash-attn on --metrics"
    )
    assert launch.env == {"CUDA_VISIBLE_DEVICES": "GPU-1"}


def test_llama_server_with_all_layers_needs_no_plan() -> None:
    argv = llama(LlamaServer(model="/m.gguf", gpu_layers="all")).argv

    assert argv[argv.index("--gpu-layers") + 1] == str(2**31 - 1)
    assert "--device" not in argv


def test_what_a_load_takes_is_told_until_it_is_known() -> None:
    def told(flags: Flags | None = None, *args: str, is_measured: bool = False) -> Launch:
        return llama_server.launch(
            LlamaServer(model="/m.gguf", args=args),
            name="chat",
            binary="/opt/llama-server",
            port=8001,
            flags=flags,
            is_measured=is_measured,
        )

    assert told().once == ("--verbosity", "4")
    assert told(is_measured=True).once == ()
    assert told().digest == told(is_measured=True).digest
    assert told(OLDER).once == ()
    assert told(None, "-lv", "3").once == ()


def test_the_profile_has_the_last_word_on_the_card() -> None:
    spec = LlamaServer(model="/m.gguf", env={"CUDA_VISIBLE_DEVICES": "1"})

    for layers in (0, 9):
        launch = llama(spec, Options(layers), device="GPU-1")
        assert launch.env == {"CUDA_VISIBLE_DEVICES": "1"}


OLDER = Flags(
    known=frozenset({"--gpu-layers", "--ctx-size", "--parallel", "--flash-attn", "--verbosity"}),
    bare=frozenset({"--flash-attn"}),
)


def test_flags_that_an_older_build_does_not_know_are_left_out() -> None:
    planned = Options(9, flash_attn="on")
    argv = llama(LlamaServer(model="/m.gguf", args=("--new",)), planned, flags=OLDER).argv

    assert argv[9:] == (
        *("--gpu-layers", "9", "--ctx-size", "4096", "--parallel", "1"),
        *("--flash-attn", "--new"),
    )


def test_a_switch_for_flash_attention_is_only_set_where_it_is_wanted() -> None:
    def argv(options: Options) -> tuple[str, ...]:
        return llama(LlamaServer(model="/m.gguf"), options, flags=OLDER).argv

    assert "--flash-attn" not in argv(Options(9, flash_attn="off"))
    assert "--flash-attn" not in argv(Options(9, flash_attn="auto"))
    assert "--flash-attn" in argv(Options(9, flash_attn="auto", cache_type_v="q8_0"))


def test_llama_server_probed_as_the_profile_says() -> None:
    by_path = llama(LlamaServer(model="/m.gguf", readiness=Readiness(http_get="/v1/models")))
    by_port = llama(LlamaServer(model="/m.gguf", readiness=Readiness(tcp=True)))

    assert by_path.target == Target(Via.HTTP, port=8001, path="/v1/models")
    assert by_port.target == Target(Via.TCP, port=8001)


def test_qdrant_is_told_by_its_environment() -> None:
    launch = qdrant.launch(Qdrant(), binary="/opt/qdrant", storage=Path("/state/qdrant"))

    assert launch == Launch(
        argv=("/opt/qdrant",),
        target=Target(Via.HTTP, port=6333, path="/readyz"),
        env={
            "QDRANT__SERVICE__HOST": "127.0.0.1",
            "QDRANT__TELEMETRY_DISABLED": "true",
            "QDRANT__STORAGE__SNAPSHOTS_PATH": "/state/qdrant-snapshots",
            "QDRANT__SERVICE__HTTP_PORT": "6333",
            "QDRANT__SERVICE__GRPC_PORT": "6334",
            "QDRANT__STORAGE__STORAGE_PATH": "/state/qdrant",
        },
        cwd=Path("/state"),
        ports=(6333, 6334),
    )


def test_qdrant_env_of_the_profile_wins_except_for_what_has_a_key_there() -> None:
    spec = Qdrant(
        port=7000,
        env={"QDRANT__SERVICE__HOST": "0.0.0.0", "QDRANT__SERVICE__HTTP_PORT": "1"},
        args=("--uri", "http://127.0.0.1:6335"),
    )
    launch = qdrant.launch(spec, binary="/opt/qdrant", storage=Path("/state/qdrant"))

    assert launch.argv == ("/opt/qdrant", "--uri", "http://127.0.0.1:6335")
    assert launch.env["QDRANT__SERVICE__HOST"] == "0.0.0.0"
    assert launch.env["QDRANT__SERVICE__HTTP_PORT"] == "7000"


def test_command_with_a_health_path() -> None:
    spec = Command(
        command=("rag", "serve"),
        args=("--verbose",),
        port=8002,
        cwd="/srv/rag",
        env={"A": "b"},
        readiness=Readiness(http_get="/health"),
    )

    assert command.launch(spec) == Launch(
        argv=("rag", "serve", "--verbose"),
        target=Target(Via.HTTP, port=8002, path="/health"),
        env={"A": "b"},
        cwd=Path("/srv/rag"),
        ports=(8002,),
        may_wait=True,
    )


def test_command_with_only_a_port_is_connected_to() -> None:
    launch = command.launch(Command(command=("rag",), port=8002))

    assert launch.target == Target(Via.TCP, port=8002)


def test_command_without_a_port_is_ready_once_it_stays_up() -> None:
    launch = command.launch(Command(command=("worker",)))

    assert launch.target == Target(Via.ALIVE)
    assert launch.ports == ()


def test_what_is_on_the_card_is_asked_for_a_batch_first() -> None:
    """As long as a batch, or as a slot has room for; embeddings are asked for in their own way."""

    def asked_for(**options: Any) -> tuple[str, int, int | None]:
        prompt = llama(LlamaServer(model="/m.gguf"), Options(20, **options)).first_prompt
        assert prompt is not None
        body = json.loads(prompt.body)
        tokens = body.get("prompt") or body["content"]
        return prompt.path, len(tokens), body.get("n_predict")

    assert asked_for() == ("/completion", 512, 0)
    assert asked_for(ctx_size=1024, parallel=4) == ("/completion", 248, 0)
    assert asked_for(ctx_size=1024, parallel=4, kv_unified=True) == ("/completion", 512, 0)
    assert asked_for(pooled=True, ubatch=128) == ("/embedding", 128, None)
    assert llama(LlamaServer(model="/m.gguf"), Options(0)).first_prompt is None
