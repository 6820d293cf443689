"""llama-server's flags that a profile sets by key, so that `args` cannot contradict it."""

from collections.abc import Iterable, Iterator

_FLAGS_BY_KEY = {
    "model": "-m --model -mu --model-url -hf -hfr --hf-repo -hff --hf-file -dr --docker-repo",
    "port": "--port",
    "gpu_layers": "-ngl --gpu-layers --n-gpu-layers",
    "ctx_size": "-c --ctx-size",
    "parallel": "-np --parallel",
    "cache_type_k": "-ctk --cache-type-k",
    "cache_type_v": "-ctv --cache-type-v",
    "batch": "-b --batch-size",
    "ubatch": "-ub --ubatch-size",
    "flash_attn": "-fa --flash-attn",
    "kv_unified": "-kvu --kv-unified -no-kvu --no-kv-unified",
    "n_cpu_moe": "-ncmoe --n-cpu-moe -cmoe --cpu-moe",
}
_KEY_BY_FLAG = {flag: key for key, flags in _FLAGS_BY_KEY.items() for flag in flags.split()}
_REFUSED = {
    "--host": "model servers listen on 127.0.0.1 only; clients use gateway.listen",
    "--api-key": "keys belong to the gateway; use gateway.api_keys_file",
    "--api-key-file": "keys belong to the gateway; use gateway.api_keys_file",
    "--api-prefix": "the gateway asks below / only",
    "--ssl-key-file": "the gateway asks without TLS, on 127.0.0.1",
    "--ssl-cert-file": "the gateway asks without TLS, on 127.0.0.1",
    "-fit": "llmsup decides what fits; use gpu_layers",
    "--fit": "llmsup decides what fits; use gpu_layers",
}


def owned_flags(args: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The positions in `args` of flags that llmsup sets itself, with what to write instead."""
    for position, argument in enumerate(args):
        flag = _spelled(argument.partition("=")[0])
        if key := _KEY_BY_FLAG.get(flag):
            yield position, f'"{flag}" is set by llmsup; use the key "{key}" of this service'
        elif reason := _REFUSED.get(flag):
            yield position, f'"{flag}" is set by llmsup: {reason}'


def _spelled(flag: str) -> str:
    """A flag as it is listed here: llama-server takes `_` for `-` in long ones."""
    return flag.replace("_", "-") if flag.startswith("--") else flag
