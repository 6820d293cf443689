from hypothesis import given
from hypothesis import strategies as st

from llmsup.services.llama_help import parse

NOW = """\
----- common params -----
-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 0)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use (default: 'auto')
                                        (env: LLAMA_ARG_FLASH_ATTN)
-kvu,  --kv-unified, -no-kvu, --no-kv-unified
                                        use single unified KV buffer (default:
                                        enabled if number of slots is auto)
-lm,   --load-mode MODE                 model loading mode (default: auto)
                                        - auto: mmap, unless a device does not support it
-ncmoe, --n-cpu-moe N                   keep the weights of the first N layers in the
-sm,   --split-mode {none,layer,row,tensor}
                                        how to split the model across multiple GPUs
-m,    --model FNAME                    model path to load
-lv,   --verbosity, --log-verbosity N   Set the verbosity threshold. Messages with
                                        a higher verbosity will be ignored. Values:
                                         - 0: generic output
                                         - 3: info
                                         - 4: trace (more info)
                                         - 5: debug
                                        (default: 3)
--port PORT                             port to listen (default: 8080)
"""

SPRING_2025 = """\
-c,    --ctx-size N                     size of the prompt context (default: 4096)
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
                                        (env: LLAMA_ARG_FLASH_ATTN)
-m,    --model FNAME                    model path (default: `models/$filename` ...)
-lv,   --verbosity, --log-verbosity N   Set the verbosity threshold. Messages with
                                        a higher verbosity will be ignored.
--port PORT                             port to listen (default: 8080)
"""

YEAR_2023 = """\
usage: ./server [options]

options:
  -h, --help                show this help message and exit
  -c N, --ctx-size N        size of the prompt context (default: 512)
  -ngl N, --n-gpu-layers N
                        number of layers to store in VRAM
  --mlock               force system to keep model in RAM rather than swapping or compressing
  -m FNAME, --model FNAME
                        model path (default: models/7B/ggml-model-f16.gguf)
  --port PORT           port to listen (default  (default: 8080)
"""


def test_a_build_of_now() -> None:
    flags = parse(NOW)

    assert flags is not None
    assert {"-c", "--ctx-size", "-fa", "-no-kvu", "--no-kv-unified", "-ncmoe"} <= flags.known
    assert "--flash-attn" in flags.known - flags.bare
    assert {"--kv-unified", "--no-kv-unified", "--help"} <= flags.bare
    assert not {"--split-mode", "--n-cpu-moe", "--port"} & flags.bare
    assert flags.has_trace
    assert "--fit" not in flags.known


def test_an_older_build_has_a_switch_for_flash_attention_and_other_levels() -> None:
    flags = parse(SPRING_2025)

    assert flags is not None
    assert "--flash-attn" in flags.bare
    assert "--verbosity" in flags.known
    assert not flags.has_trace
    assert "--n-cpu-moe" not in flags.known


def test_a_build_that_shows_the_value_after_each_name() -> None:
    flags = parse(YEAR_2023)

    assert flags is not None
    assert {"-c", "--ctx-size", "-ngl", "--n-gpu-layers", "--mlock", "--model"} <= flags.known
    assert flags.bare == {"-h", "--help", "--mlock"}


def test_the_help_of_another_program_is_none() -> None:
    assert parse("usage: x [-h]\n\n--port PORT   a port\n--model X   a model\n") is None
    assert parse("") is None


@given(st.text())
def test_no_text_does_more_than_be_none(text: str) -> None:
    assert parse(text) is None or "--ctx-size" in text
