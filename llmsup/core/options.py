"""What a llama-server is told that its memory depends on. All of it is said explicitly."""

from dataclasses import dataclass
from typing import Literal

FlashAttention = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one process, as its command line says them.

    `gpu_layers` counts as the engine does: the output layer first, then repeating layers from the
    last one on; one more than there are repeating layers is all of them. 0 keeps the process off
    the card altogether. `n_cpu_moe`: of so many layers, from the first on, the experts stay on the
    host. `ctx_size` is in tokens, shared by the `parallel` slots. `batch` and `ubatch` are tokens.
    `pooled`: it answers embeddings or ranks, so each token of a batch has an output.
    """

    gpu_layers: int
    n_cpu_moe: int = 0
    ctx_size: int = 4096
    parallel: int = 1
    kv_unified: bool = False
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    batch: int = 2048
    ubatch: int = 512
    flash_attn: FlashAttention = "auto"
    pooled: bool = False
    kv_offload: bool = True
    op_offload: bool = True
    swa_full: bool = False
