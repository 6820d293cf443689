"""llama.cpp's server: its flags and its health endpoint."""

from pathlib import Path

from llmsup.config.schema import LlamaServer
from llmsup.services.launch import Launch, Target, Via


def launch(spec: LlamaServer, *, name: str, binary: str, port: int) -> Launch:
    """The command line of one llama-server; `spec.args` come last, so that they have the last word.

    `--fit off`: what goes where on the card is decided by the profile, not by the server.
    `--ctx-size` is shared out: each of the `parallel` slots gets its part of it.
    """
    argv = [
        *(binary, "--host", "127.0.0.1", "--port", str(port)),
        *("--model", spec.model, "--alias", name, "--offline"),
        *("--gpu-layers", str(spec.gpu_layers), "--fit", "off"),
        *("--ctx-size", str(spec.ctx_size), "--parallel", str(spec.parallel)),
        *("--cache-type-k", spec.cache_type_k, "--cache-type-v", spec.cache_type_v),
        *("--flash-attn", spec.flash_attn, "--metrics"),
    ]
    optional = (
        ("--batch-size", spec.batch),
        ("--ubatch-size", spec.ubatch),
        ("--n-cpu-moe", spec.n_cpu_moe),
    )
    for flag, number in optional:
        if number is not None:
            argv += [flag, str(number)]
    if spec.kv_unified is not None:
        argv.append("--kv-unified" if spec.kv_unified else "--no-kv-unified")
    if spec.readiness.tcp:
        target = Target(Via.TCP, port=port)
    else:
        target = Target(Via.HTTP, port=port, path=spec.readiness.http_get or "/health")
    return Launch(
        argv=(*argv, *spec.args),
        target=target,
        env=spec.env,
        ports=(port,),
        models=(Path(spec.model),),
        tells_work=True,
    )
