"""What the engine knows of each architecture that no header says. One row each.

Source: src/models/*.cpp and src/llama-model.cpp of llama.cpp b11434.
"""

from dataclasses import dataclass
from typing import Literal

Recurrence = Literal["", "all", "beside", "interval", "no heads", "no heads, no feed-forward"]
"""Which layers keep a state: none; all; all, beside their cache; all but each n-th; by heads."""


Rope = Literal["all", "none", "sliding", "not each 4th"]
"""The layers whose keys and queries are turned by their position."""


DropsRows = Literal["in the layer", "after it", "after the norm"]
"""Where the rows without an output are dropped: around the last layer."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Attention windows, caches and states of an architecture, and how its graph differs.

    `window`: the tokens of a sliding window where the header does not say. `window_period`: of so
    many layers all but the last slide; with `dense_first` all but the first. `has_cache`: keys and
    values are kept at all. `windows_with_blocks`: there are windows only with so many layers.

    `plain_norm`: its norms subtract the mean. `scales_rows`: the embedding is scaled by an input;
    `scales_q`: the queries are scaled before attention; `norms_values`: the values have a norm
    too. `has_streams`: its layers work on several streams, see gemma3n.py. `norms_experts`: the
    weights of the chosen experts are divided by their sum, where no key says; `weighs_late`: they
    are made of the chosen alone. `gates_by_sigmoid`: the router, where no key says. `squares`: the
    feed-forward squares what is positive. `adds_to_residual`: the residual is the first operand.
    `sums_branches`: attention and feed-forward stand side by side and are added first.
    `gates_attention`: queries come with a gate. `positions`: so many for each token.
    `pools_or_talks`: there are no logits where there are embeddings. `has_graph`: its operations
    are known here; else its compute buffer gets an upper bound.
    """

    window: int = 0
    window_period: int = 0
    dense_first: bool = False
    has_windows: bool = False
    all_slide: bool = False
    fixes_window: bool = False
    ignores_window: bool = False
    has_cache: bool = True
    is_causal: bool = True
    caches_of_the_first: int = 0
    windows_with_blocks: int = 0
    recurrence: Recurrence = ""
    plain_norm: bool = False
    scales_rows: bool = False
    scales_q: bool = False
    norms_values: bool = False
    has_streams: bool = False
    rope: Rope = "all"
    norms_experts: bool = True
    drops_rows: DropsRows = "in the layer"
    positions: int = 1
    pools_or_talks: bool = False
    has_graph: bool = True
    gates_attention: bool = False
    adds_to_residual: bool = False
    sums_branches: bool = False
    squares: bool = False
    weighs_late: bool = False
    gates_by_sigmoid: bool = False


def _sliding(period: int, **others: int | bool | str) -> Architecture:
    return Architecture(window_period=period, has_windows=True, **others)  # type: ignore[arg-type]


UNKNOWN = Architecture(has_graph=False, recurrence="beside")
"""Of one that is not listed: every layer attends to all tokens, and keeps the state of its keys."""

_PLAIN = Architecture()
_ENCODER = Architecture(has_cache=False, is_causal=False, plain_norm=True)

_TABLE: dict[str, Architecture] = {
    **dict.fromkeys(
        (
            "llama", "qwen2", "qwen3", "qwen3moe", "glm4moe", "gemma",
            "granite", "granitemoe", "mistral3", "glm4",
            "phimoe", "internlm2", "exaone",
            "qwen2vl", "qwen3vl", "qwen3vlmoe", "dots1", "ernie4_5", "ernie4_5-moe", "minicpm",
            "hunyuan-dense", "hunyuan-moe", "bailingmoe", "bailingmoe2", "seed_oss", "arcee",
            "baichuan", "xverse", "deepseek", "minimax-m2", "chatglm",
            "qwen", "apertus", "pangu-embedded", "minicpm3",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        ("starcoder2", "stablelm", "command-r", "nemotron", "olmo", "orion", "gptneox"),
        Architecture(plain_norm=True),
    ),
    **dict.fromkeys(("gpt2", "starcoder"), Architecture(plain_norm=True, rope="none")),
    "phi2": Architecture(plain_norm=True, scales_q=True, sums_branches=True),
    **dict.fromkeys(("qwen2moe", "olmoe", "deepseek2"), Architecture(norms_experts=False)),
    "smollm3": Architecture(rope="not each 4th"),
    **dict.fromkeys(("nomic-bert", "jina-bert-v3"), _ENCODER),
    **dict.fromkeys(
        ("nomic-bert-moe", "neo-bert", "eurobert", "dream", "llada", "llada-moe", "rnd1"),
        Architecture(has_cache=False, is_causal=False, has_graph=False),
    ),
    **dict.fromkeys(
        ("bert", "jina-bert-v2"),
        Architecture(has_cache=False, is_causal=False, plain_norm=True, rope="none"),
    ),
    "modern-bert": _sliding(
        3, dense_first=True, has_cache=False, is_causal=False, has_graph=False
    ),
    "gemma-embedding": _sliding(6, has_cache=False, is_causal=False, has_graph=False),
    "gemma2": _sliding(2, window=4096, scales_q=True),
    "gemma3": _sliding(6, scales_rows=True, scales_q=True),
    "gemma3n": _sliding(
        5, caches_of_the_first=20, scales_rows=True, norms_values=True, has_streams=True
    ),
    "gemma4": _sliding(0, scales_rows=True, has_graph=False),
    "gpt-oss": _sliding(2, drops_rows="after it", weighs_late=True, norms_experts=False),
    "cohere2": _sliding(4, plain_norm=True, rope="sliding"),
    "cohere2moe": _sliding(4, dense_first=True, has_graph=False),
    "exaone4": _sliding(4, window=4096, windows_with_blocks=64, rope="sliding"),
    "exaone-moe": _sliding(4, window=128, has_graph=False),
    "olmo2": _sliding(4),
    "llama4": _sliding(4, window=8192, fixes_window=True, has_graph=False),
    "plamo3": _sliding(8, has_graph=False),
    "afmoe": _sliding(4, has_graph=False),
    "mellum": _sliding(4, has_graph=False),
    "laguna": _sliding(4, dense_first=True, has_graph=False),
    "smallthinker": _sliding(4, dense_first=True, window=4096, fixes_window=True, has_graph=False),
    "mimo2": _sliding(0, has_graph=False),
    "step35": _sliding(0, has_graph=False),
    "maple": _sliding(0, has_graph=False),
    "granite-swa": _sliding(0, has_graph=False),
    "phi3": Architecture(ignores_window=True, scales_q=True, adds_to_residual=True),
    **dict.fromkeys(
        ("mamba", "mamba2"), Architecture(has_cache=False, recurrence="all")
    ),
    **dict.fromkeys(
        ("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"),
        Architecture(has_cache=False, recurrence="all", has_graph=False),
    ),
    **dict.fromkeys(
        ("plamo2", "kimi-linear"),
        Architecture(recurrence="no heads", has_graph=False),
    ),
    "granitehybrid": Architecture(recurrence="no heads"),
    "jamba": Architecture(
        recurrence="no heads", rope="none", adds_to_residual=True, norms_experts=False
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2moe"),
        Architecture(
            recurrence="no heads", has_windows=True, all_slide=True, adds_to_residual=True,
            pools_or_talks=True,
        ),
    ),
    "falcon-h1": Architecture(recurrence="beside"),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"), Architecture(
            recurrence="no heads, no feed-forward", rope="none", squares=True,
            gates_by_sigmoid=True, drops_rows="after the norm",
        )
    ),
    **dict.fromkeys(
        ("qwen35", "qwen35moe"),
        Architecture(
            recurrence="interval", gates_attention=True, drops_rows="after the norm", positions=4
        ),
    ),
    "qwen3next": Architecture(
        recurrence="interval", gates_attention=True, drops_rows="after the norm"
    ),
}  # fmt: skip


def architecture(name: str) -> Architecture:
    """The row of `name`, as the header calls it; UNKNOWN where there is none."""
    return _TABLE.get(name, UNKNOWN)
