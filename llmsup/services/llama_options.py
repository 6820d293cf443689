"""What a profile asks of a llama-server, as options; and what a plan may choose of them.

Flags that have a key of the profile are refused among a service's `args`, so only those that have
none are looked for there. They are the flags of llama.cpp's common/arg.cpp, and as there the last
one of a kind counts.
"""

from collections.abc import Iterator

from llmsup.config.schema import LlamaServer
from llmsup.core.options import Options
from llmsup.core.plan import Knob

BATCH = 2048
UBATCH = 512
"""llama-server's own, in tokens."""

_SWITCHES = {
    "--embedding": ("embedding", True),
    "--embeddings": ("embedding", True),
    "--rerank": ("embedding", True),
    "--reranking": ("embedding", True),
    "-nkvo": ("kv_offload", False),
    "--no-kv-offload": ("kv_offload", False),
    "-kvo": ("kv_offload", True),
    "--kv-offload": ("kv_offload", True),
    "--no-op-offload": ("op_offload", False),
    "--op-offload": ("op_offload", True),
    "--swa-full": ("swa_full", True),
}
_VALUED = {
    "--pooling": "pooling",
    "-dev": "device",
    "--device": "device",
    "-ot": "override_tensor",
    "--override-tensor": "override_tensor",
    "-ncffn": "n_cpu_ffn",
    "--n-cpu-ffn": "n_cpu_ffn",
}
_FILES = {
    "-mm": "mmproj",
    "--mmproj": "mmproj",
    "-md": "draft",
    "--model-draft": "draft",
    "--spec-draft-model": "draft",
    "--lora": "lora",
    "--lora-scaled": "lora-scaled",
    "--control-vector": "lora",
    "--control-vector-scaled": "lora-scaled",
}
_VARIABLES = {
    "LLAMA_ARG_EMBEDDINGS": "--embeddings",
    "LLAMA_ARG_RERANKING": "--reranking",
    "LLAMA_ARG_POOLING": "--pooling",
    "LLAMA_ARG_SWA_FULL": "--swa-full",
    "LLAMA_ARG_DEVICE": "--device",
    "LLAMA_ARG_OVERRIDE_TENSOR": "--override-tensor",
    "LLAMA_ARG_N_CPU_FFN": "--n-cpu-ffn",
    "LLAMA_ARG_MMPROJ": "--mmproj",
    "LLAMA_ARG_SPEC_DRAFT_MODEL": "--model-draft",
}
"""What a service's `env` can say instead; inherited ones are not handed on."""


def asked(spec: LlamaServer, layers: int) -> Options:
    """The service with everything at its best: all its `layers` on the card, where it may choose.

    What is computed for each token of a batch (embeddings, ranks) needs it in one piece, so there
    the engine takes no larger batch than `ubatch`.
    """
    words = dict(_words(spec))
    ubatch = UBATCH if spec.ubatch is None else spec.ubatch
    batch = BATCH if spec.batch is None else spec.batch
    is_embedding = words.get("embedding") is True
    return Options(
        gpu_layers=0 if words.get("device") == "none" else _layers(spec, layers),
        n_cpu_moe=spec.n_cpu_moe or 0,
        ctx_size=spec.ctx_size,
        parallel=spec.parallel,
        kv_unified=bool(spec.kv_unified),
        cache_type_k=spec.cache_type_k,
        cache_type_v=spec.cache_type_v,
        batch=min(batch, ubatch) if is_embedding else batch,
        ubatch=ubatch,
        flash_attn=spec.flash_attn,
        pooled=is_embedding or words.get("pooling", "none") != "none",
        kv_offload=words.get("kv_offload") is not False,
        op_offload=words.get("op_offload") is not False,
        swa_full=words.get("swa_full") is True,
    )


def knobs(spec: LlamaServer) -> frozenset[Knob]:
    """What a plan may choose: what neither the profile nor its `args` have chosen."""
    words = dict(_words(spec))
    if spec.gpu_layers != "auto" or words.get("device") == "none":
        return frozenset()
    if spec.n_cpu_moe is not None or words.keys() & {"override_tensor", "n_cpu_ffn"}:
        return frozenset({Knob.GPU_LAYERS})
    return frozenset(Knob)


def extra_files(spec: LlamaServer) -> tuple[str, ...]:
    """The files that it loads besides its model, as they are written: projector, draft, adapters.

    Their sizes are what is known of the memory that they need.
    """
    files: dict[str, tuple[str, ...]] = {}
    for kind, value in _words(spec):
        if kind not in _FILES.values() or not isinstance(value, str):
            continue
        several = value.split(",") if kind.startswith("lora") else [value]
        if kind == "lora-scaled":
            several = [each.rpartition(":")[0] or each for each in several]
        before = files.get(kind, ()) if kind.startswith("lora") else ()
        files[kind] = (*before, *filter(None, several))
    return tuple(file for each in files.values() for file in each)


def _layers(spec: LlamaServer, layers: int) -> int:
    return layers if isinstance(spec.gpu_layers, str) else min(spec.gpu_layers, layers)


def _words(spec: LlamaServer) -> Iterator[tuple[str, str | bool]]:
    """What is said outside the keys of the profile; what has the last word comes last."""
    for variable, flag in _VARIABLES.items():
        if value := spec.env.get(variable):
            yield from _word(flag, value if flag in _VALUED | _FILES else None)
            if flag in _SWITCHES and value in {"off", "disabled", "false", "0"}:
                yield _SWITCHES[flag][0], False
    for position, argument in enumerate(spec.args):
        flag = argument.replace("_", "-") if argument.startswith("--") else argument
        following = spec.args[position + 1 : position + 2]
        yield from _word(flag, following[0] if following else None)


def _word(flag: str, value: str | None) -> Iterator[tuple[str, str | bool]]:
    if flag in _SWITCHES:
        yield _SWITCHES[flag]
    elif value is not None and (kind := _VALUED.get(flag) or _FILES.get(flag)):
        yield kind, value
