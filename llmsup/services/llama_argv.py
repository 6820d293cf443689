"""Reads off a llama-server's command line what a plan had given it: the way back of `launch`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from llmsup.core.options import Options

_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "--gpu-layers": ("gpu_layers", int),
    "--n-cpu-moe": ("n_cpu_moe", int),
    "--ctx-size": ("ctx_size", int),
    "--cache-type-k": ("cache_type_k", str),
    "--cache-type-v": ("cache_type_v", str),
    "--batch-size": ("batch", int),
    "--ubatch-size": ("ubatch", int),
}


def read_back(argv: Sequence[str], best: Options) -> Options:
    """The options of a process with this command line; what a plan leaves alone is as in `best`.

    Words that are not understood are passed over: they are not from `launch`.
    """
    options = replace(best, n_cpu_moe=0)
    is_off_card = False
    for flag, word in pairwise(argv):
        if flag in _FIELDS:
            name, read = _FIELDS[flag]
            try:
                options = replace(options, **{name: read(word)})
            except ValueError:
                continue
        elif flag == "--device":
            is_off_card = word == "none"
    return replace(options, gpu_layers=0) if is_off_card else options
