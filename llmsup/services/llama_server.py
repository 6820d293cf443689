"""llama.cpp's server: its flags and its health endpoint."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llmsup.config.schema import PLAIN_CACHE_TYPES, LlamaServer
from llmsup.core.options import Options
from llmsup.services.launch import Launch, Prompt, Slots, Target, Via
from llmsup.services.llama_help import Flags
from llmsup.services.llama_options import asked

HEALTH = "/health"
"""It says 503 there, and why, while it loads its model: it listens before."""

LAYERS_MAX = 2**31 - 1
"""Stands for "all" where it is not known how many there are; the engine takes no more than all."""

FIRST_TOKEN = 1
"""What the first prompt consists of."""

_SAVE_PATH = "--slot-save-path"
_VERBOSITY = frozenset(
    ["-lv", "--verbosity", "--log-verbosity", "-v", "--verbose", "--log-verbose", "--log-disable"]
)


def launch(
    spec: LlamaServer,
    *,
    name: str,
    binary: str,
    port: int,
    options: Options | None = None,
    device: str | None = None,
    flags: Flags | None = None,
    is_measured: bool = False,
    slot_directory: Path | None = None,
) -> Launch:
    """The command line of one llama-server; `spec.args` come last, so that they have the last word.

    `options` are what was planned, and all of them are said: what the memory depends on is left to
    no default. None: nothing was planned, the profile's own words hold, and a number of layers
    that it leaves to a plan is 0. `device`: the UUID of the card that was planned with. `flags`
    that the engine is known not to have are left out; None: it is taken to have them all.
    `is_measured`: the size of each buffer is known from an earlier load, so it need not be told.
    `slot_directory`: where it may save its slots; it must be there.
    """
    chosen = options or _unplanned(spec)
    slots = None
    if slot_directory is not None and (flags is None or _SAVE_PATH in flags.known):
        slots = _slots(spec, name, chosen)
    argv = [
        *(binary, "--host", "127.0.0.1", "--port", str(port)),
        *("--model", spec.model, "--alias", name),
    ]
    for flag, *value in _said(chosen, flags):
        if flags is None or flag in flags.known:
            argv += [flag, *value]
    if slots is not None:
        argv += [_SAVE_PATH, str(slot_directory)]
    if spec.readiness.tcp:
        target = Target(Via.TCP, port=port)
    else:
        target = Target(Via.HTTP, port=port, path=spec.readiness.http_get or HEALTH)
    return Launch(
        argv=(*argv, *spec.args),
        target=target,
        env=_env(chosen, device) | spec.env,
        ports=(port,),
        models=(Path(spec.model),),
        tells_work=True,
        once=() if is_measured else _telling(spec, flags),
        first_prompt=_first_prompt(chosen) if chosen.gpu_layers else None,
        slots=slots,
    )


def _slots(spec: LlamaServer, name: str, options: Options) -> Slots | None:
    """None where nothing is to be kept, or its user saves slots in a place of their own.

    What is on the card and what is not makes no difference to a prompt cache.
    """
    own = any(each.replace("_", "-") == _SAVE_PATH for each in spec.args)
    if own or not spec.warm_for_s or options.pooled:
        return None
    anywhere = replace(options, gpu_layers=0, n_cpu_moe=0)
    essence = repr((name, spec.model, anywhere, spec.args, sorted(spec.env.items())))
    return Slots(anywhere, essence, spec.warm_for_s)


def _first_prompt(options: Options) -> Prompt:
    """As long as a batch. CUDA's pools grow with the first such prompt, and never shrink.

    Were it a client's, another program might have taken that memory before.
    """
    room = options.ctx_size if options.kv_unified else options.ctx_size // options.parallel
    tokens = [FIRST_TOKEN] * max(1, min(options.ubatch, room - 8))
    if options.pooled:
        return Prompt("/embedding", json.dumps({"content": tokens}).encode())
    document = {"prompt": tokens, "n_predict": 0, "cache_prompt": False}
    return Prompt("/completion", json.dumps(document).encode())


def _unplanned(spec: LlamaServer) -> Options:
    return asked(spec, 0 if spec.gpu_layers == "auto" else LAYERS_MAX)


def _said(options: Options, flags: Flags | None) -> Iterator[tuple[str, ...]]:
    yield ("--offline",)
    yield "--gpu-layers", str(options.gpu_layers)
    if not options.gpu_layers:
        # With 0 layers alone the engine still takes a context and a compute buffer on the card.
        yield "--device", "none"
    yield "--n-cpu-moe", str(options.n_cpu_moe)
    yield "--fit", "off"  # what goes where is decided for all services together
    yield "--ctx-size", str(options.ctx_size)
    yield "--parallel", str(options.parallel)
    yield ("--kv-unified" if options.kv_unified else "--no-kv-unified",)
    yield "--batch-size", str(options.batch)
    yield "--ubatch-size", str(options.ubatch)
    yield "--cache-type-k", options.cache_type_k
    yield "--cache-type-v", options.cache_type_v
    if flags is None or "--flash-attn" not in flags.bare:
        yield "--flash-attn", options.flash_attn
    elif options.flash_attn == "on" or _needs_flash_attention(options):
        yield ("--flash-attn",)
    yield ("--metrics",)


def _telling(spec: LlamaServer, flags: Flags | None) -> tuple[str, ...]:
    """So talkative that it tells the size of each buffer; older builds do so anyway."""
    if _VERBOSITY.intersection(spec.args) or (flags is not None and not flags.has_trace):
        return ()
    return "--verbosity", "4"


def _needs_flash_attention(options: Options) -> bool:
    """A quantised V cache does; builds that know of "auto" see to it themselves."""
    return options.flash_attn == "auto" and options.cache_type_v not in PLAIN_CACHE_TYPES


def _env(options: Options, device: str | None) -> dict[str, str]:
    """CUDA counts cards from the fastest on, NVML by their slots: a UUID is the same for both.

    What stays off the card sees none: `--device none` does not hold for a projector or a draft.
    """
    if not options.gpu_layers:
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
