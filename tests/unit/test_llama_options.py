import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.config.schema import LlamaServer
from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Knob
from llmsup.services.llama_options import asked, extra_files, knobs

FLAGS = [
    *("--embeddings", "--rerank", "--pooling", "-nkvo", "--kv-offload", "--no-op-offload"),
    *("--swa-full", "-dev", "--device", "-ot", "--mmproj", "-md", "--lora", "--lora-scaled"),
    *("none", "mean", "a.gguf", "a.gguf:0.5,b.gguf"),
]


def model(*args: str, **keys: Any) -> LlamaServer:
    return LlamaServer(model="/m.gguf", args=args, **keys)


def test_a_plain_service_asks_for_everything() -> None:
    assert asked(model(), 37) == Options(37)
    assert knobs(model()) == set(Knob)


@pytest.mark.parametrize(
    ("layers", "asked_for"), [("auto", 25), ("all", 25), (9, 9), (99, 25), (0, 0)]
)
def test_layers_as_the_profile_says(layers: Any, asked_for: int) -> None:
    spec = model(gpu_layers=layers, n_cpu_moe=None if layers == "auto" else 3)

    assert asked(spec, 25).gpu_layers == asked_for
    assert bool(knobs(spec)) == (layers == "auto")


def test_what_the_profile_sets_is_not_for_the_plan_to_choose() -> None:
    assert knobs(model(n_cpu_moe=0)) == {Knob.GPU_LAYERS}


def test_every_key_is_asked_for() -> None:
    spec = model(
        ctx_size=8192, parallel=4, kv_unified=True, cache_type_k="q8_0", cache_type_v="q4_0",
        batch=1024, ubatch=256, flash_attn="on", n_cpu_moe=5,
    )  # fmt: skip

    assert asked(spec, 9) == Options(
        gpu_layers=9, n_cpu_moe=5, ctx_size=8192, parallel=4, kv_unified=True,
        cache_type_k="q8_0", cache_type_v="q4_0", batch=1024, ubatch=256, flash_attn="on",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("--embeddings",), Options(9, batch=512, pooled=True)),
        (("--reranking",), Options(9, batch=512, pooled=True)),
        (("--pooling", "mean"), Options(9, pooled=True)),
        (("--pooling", "none"), Options(9)),
        (("--pooling", "rank", "--pooling", "none"), Options(9)),
        (("-nkvo",), Options(9, kv_offload=False)),
        (("--no_kv_offload",), Options(9, kv_offload=False)),
        (("-nkvo", "--kv-offload"), Options(9)),
        (("--no-op-offload",), Options(9, op_offload=False)),
        (("--swa-full",), Options(9, swa_full=True)),
        (("--device", "none"), Options(0)),
        (("-dev", "CUDA0"), Options(9)),
        (("--device",), Options(9)),
    ],
)
def test_args_have_the_last_word(args: tuple[str, ...], options: Options) -> None:
    assert asked(model(*args), 9) == options


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ({"LLAMA_ARG_EMBEDDINGS": "1"}, Options(9, batch=512, pooled=True)),
        ({"LLAMA_ARG_EMBEDDINGS": "0"}, Options(9)),
        ({"LLAMA_ARG_DEVICE": "none"}, Options(0)),
        ({"LLAMA_ARG_POOLING": "cls"}, Options(9, pooled=True)),
    ],
)
def test_so_has_the_environment_of_the_service(env: dict[str, str], options: Options) -> None:
    assert asked(model(env=env), 9) == options


def test_args_come_after_the_environment() -> None:
    spec = model("--device", "CUDA0", env={"LLAMA_ARG_DEVICE": "none"})

    assert asked(spec, 9).gpu_layers == 9


@pytest.mark.parametrize("args", [("--device", "none"), ("-ot", "exps=CPU"), ("-ncffn", "3")])
def test_what_args_decide_is_not_for_the_plan_to_choose(args: tuple[str, ...]) -> None:
    assert Knob.N_CPU_MOE not in knobs(model(*args))
    assert (Knob.GPU_LAYERS in knobs(model(*args))) == (args[1] != "none")


@pytest.mark.parametrize(
    ("args", "files"),
    [
        (("--embeddings",), ()),
        (("--mmproj", "/p.gguf", "-md", "/d.gguf"), ("/p.gguf", "/d.gguf")),
        (("--mmproj", "/old.gguf", "-mm", "/p.gguf"), ("/p.gguf",)),
        (("--lora", "/a,/b", "--lora", "/c"), ("/a", "/b", "/c")),
        (("--lora-scaled", "/a:0.5,/b"), ("/a", "/b")),
        (("--mmproj",), ()),
    ],
)
def test_files_besides_the_model(args: tuple[str, ...], files: tuple[str, ...]) -> None:
    assert extra_files(model(*args)) == files


@given(
    args=st.lists(st.one_of(st.sampled_from(FLAGS), st.text(string.printable, max_size=9))),
    layers=st.integers(1, 99),
)
def test_no_args_do_more_than_be_passed_over(args: list[str], layers: int) -> None:
    spec = model(*args)

    assert asked(spec, layers).gpu_layers in {0, layers}
    assert asked(spec, layers).batch in {512, 2048}
    assert knobs(spec) <= set(Knob)
    assert all(extra_files(spec))


def test_degradations_are_those_of_a_plan() -> None:
    words = tuple(each.value for each in Degrade)
    spec = model(degrade=words, ctx_size_min=1)

    assert tuple(map(Degrade, spec.degrade)) == tuple(Degrade)
