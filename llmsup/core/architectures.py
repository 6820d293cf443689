"""What the engine knows of each architecture that no header says. One row each.

Source: src/models/*.cpp and src/llama-model.cpp of llama.cpp b11434.
"""

from dataclasses import dataclass
from typing import Literal

Recurrence = Literal["", "all", "beside", "interval", "no heads", "no heads, no feed-forward"]
"""Which layers keep a state: none; all; all, beside their cache; all but each n-th; by heads."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Attention windows, caches and recurrent states of an architecture.

    `window`: the tokens of a sliding window where the header does not say. `window_period`: of so
    many layers all but the last slide; with `dense_first` all but the first. `has_cache`: keys and
    values are kept at all.
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
    recurrence: Recurrence = ""


def _sliding(period: int, **others: int | bool) -> Architecture:
    return Architecture(window_period=period, has_windows=True, **others)  # type: ignore[arg-type]


UNKNOWN = Architecture(has_windows=False)
"""Of an architecture that is not listed: every layer attends to all tokens."""

_PLAIN = Architecture()
_ENCODER = Architecture(has_cache=False, is_causal=False)

_TABLE: dict[str, Architecture] = {
    **dict.fromkeys(
        (
            "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "deepseek2", "glm4moe", "gemma",
            "granite", "granitemoe", "mistral3", "smollm3", "starcoder2", "olmoe", "glm4",
            "phi2", "phimoe", "stablelm", "internlm2", "command-r", "exaone", "nemotron",
            "qwen2vl", "qwen3vl", "qwen3vlmoe", "dots1", "ernie4_5", "ernie4_5-moe", "minicpm",
            "hunyuan-dense", "hunyuan-moe", "bailingmoe", "bailingmoe2", "seed_oss", "arcee",
            "falcon", "olmo", "orion", "baichuan", "xverse", "deepseek", "minimax-m2", "chatglm",
            "gptneox", "gpt2", "starcoder", "mpt", "bloom", "qwen", "dbrx", "grok", "arctic",
            "apertus", "pangu-embedded", "plm", "minicpm3",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert",
         "eurobert"),
        _ENCODER,
    ),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _ENCODER),
    "modern-bert": _sliding(3, dense_first=True, has_cache=False, is_causal=False),
    "gemma-embedding": _sliding(6, has_cache=False, is_causal=False),
    "gemma2": _sliding(2, window=4096),
    "gemma3": _sliding(6),
    "gemma3n": _sliding(5, caches_of_the_first=20),
    "gemma4": _sliding(0),
    "gpt-oss": _sliding(2),
    "cohere2": _sliding(4),
    "cohere2moe": _sliding(4, dense_first=True),
    "exaone4": _sliding(4, window=4096),
    "exaone-moe": _sliding(4, window=128),
    "olmo2": _sliding(4),
    "llama4": _sliding(4, window=8192, fixes_window=True),
    "plamo3": _sliding(8),
    "afmoe": _sliding(4),
    "mellum": _sliding(4),
    "laguna": _sliding(4, dense_first=True),
    "smallthinker": _sliding(4, dense_first=True, window=4096, fixes_window=True),
    "mimo2": _sliding(0),
    "step35": _sliding(0),
    "maple": _sliding(0),
    "granite-swa": _sliding(0),
    "phi3": Architecture(ignores_window=True),
    **dict.fromkeys(
        ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"),
        Architecture(has_cache=False, recurrence="all"),
    ),
    **dict.fromkeys(
        ("jamba", "granitehybrid", "plamo2", "kimi-linear"),
        Architecture(recurrence="no heads"),
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2moe"),
        Architecture(recurrence="no heads", has_windows=True, all_slide=True),
    ),
    "falcon-h1": Architecture(recurrence="beside"),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"), Architecture(recurrence="no heads, no feed-forward")
    ),
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), Architecture(recurrence="interval")),
}  # fmt: skip


def architecture(name: str) -> Architecture:
    """The row of `name`, as the header calls it; UNKNOWN where there is none."""
    return _TABLE.get(name, UNKNOWN)
