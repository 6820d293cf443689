"""Model files on the disk, and what the daemon makes of them before it spawns a server."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from bench.models import smollm2
from llmsup.core.gguf_reader import HEADER_MAX_BYTES
from llmsup.errors import Flaw, LaunchError, ModelFileError
from llmsup.host import gguf
from tests.gguf_files import SMALL, TENSORS, Entry, Item, header, split, write_sparse
from tests.gguf_files import gguf as gguf_bytes
from tests.home import STUBS, Home, free_ports, wait_until


def flaw(path: Path) -> tuple[Flaw, str]:
    with pytest.raises(ModelFileError) as raised:
        gguf.look(path)
    return raised.value.flaw, raised.value.message


def parts(directory: Path, *tables: tuple[Entry, ...], **changed: Item) -> list[Path]:
    """A split model, a part for each table; `changed` keys of the second part."""
    count, tensor_count = len(tables), sum(map(len, tables))
    paths = []
    for number, table in enumerate(tables):
        path = directory / f"m-{number + 1:05}-of-{count:05}.gguf"
        keys = split(count, number, tensor_count) | (changed if number == 1 else {})
        paths.append(write_sparse(path, {**(SMALL if number == 0 else {}), **keys}, table))
    return paths


# --- one file


def test_a_real_model_is_read() -> None:
    model = gguf.look(smollm2())

    assert (model.version, model.architecture, model.vocabulary_size) == (3, "llama", 49152)
    assert model.metadata["llama.block_count"] == 30
    assert len(model.tensors) == 272
    assert model.file_bytes == smollm2().stat().st_size
    last = max(model.tensors, key=lambda tensor: tensor.offset)
    assert model.parts[0].data_offset + last.offset + last.size_bytes == model.file_bytes


def test_a_vocabulary_beyond_the_first_bytes_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "FIRST_READ_BYTES", 100)
    tokens: Item = ("string[]", [f"<t{number}>" for number in range(5000)])
    path = write_sparse(tmp_path / "m.gguf", {**SMALL, "tokenizer.ggml.tokens": tokens})

    assert gguf.look(path).vocabulary_size == 5000


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sparse(tmp_path / "m.gguf")
    first = gguf.look(path)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "parse", lambda *_: pytest.fail("it was read again"))
        assert gguf.look(path) is first
    os.truncate(path, path.stat().st_size - 1)

    assert flaw(path) == (
        Flaw.TRUNCATED,
        "model file truncated: m.gguf: the last 1 bytes of its tensors are missing",
    )
    write_sparse(path)
    assert gguf.look(path) == first


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("version https://git-lfs")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").touch()
    for name, kind, words in (
        ("pipe", Flaw.FORMAT, "model file of another format: pipe: it is a named pipe"),
        ("folder", Flaw.FORMAT, "model file of another format: folder: it is a directory"),
        ("text", Flaw.FORMAT, "text: it starts with b'vers', not with b'GGUF'"),
        ("none", Flaw.MISSING, f"model file missing: there is no {tmp_path}/none"),
        ("loop", Flaw.MISSING, "there is no"),
        ("text/none", Flaw.MISSING, "there is no"),
        ("x" * 300, Flaw.MISSING, "there is no"),
        ("empty", Flaw.TRUNCATED, "model file truncated: empty: it is empty"),
    ):
        found, said = flaw(tmp_path / name)
        assert found is kind
        assert words in said
        with pytest.raises(LaunchError) as raised:
            gguf.require_loadable(tmp_path / name)
        assert raised.value.permanent


def test_a_name_that_would_upset_a_terminal_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[31m.gguf"
    path.touch()

    assert "a\\n\\x1b[31m.gguf" in flaw(path)[1]


def test_what_an_engine_may_know_better_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = tmp_path / "future.gguf"
    future.write_bytes(gguf_bytes(version=9))
    assert flaw(future)[0] is Flaw.UNKNOWN
    gguf.require_loadable(future)

    unheard_of = write_sparse(
        tmp_path / "new.gguf", {**SMALL, "general.architecture": ("string", "unheard-of")}
    )
    gguf.require_loadable(unheard_of)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    fresh = write_sparse(tmp_path / "fresh.gguf")
    monkeypatch.setattr(os, "open", refuse)
    assert flaw(fresh) == (
        Flaw.UNREADABLE,
        "model file not readable: fresh.gguf: Permission denied",
    )
    gguf.require_loadable(fresh)


def test_a_file_that_shrinks_while_it_is_read_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sparse(tmp_path / "m.gguf")
    monkeypatch.setattr(os, "pread", lambda *_: b"")

    assert flaw(path)[0] is Flaw.UNREADABLE


def test_a_header_without_end_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a file of 1 TB whose first string takes all of it, little is read and less is kept."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header({"x": ("string", "")}, ())[0].replace(bytes(8), b"\xff" * 4, 1))
    os.truncate(path, 10**12)
    asked: list[int] = []
    pread = os.pread

    def note(file: int, length: int, offset: int) -> bytes:
        asked.append(length)
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", note)
    assert flaw(path)[0] in {Flaw.UNKNOWN, Flaw.CORRUPT}
    assert sum(asked) <= HEADER_MAX_BYTES


# --- several parts


def test_the_parts_of_a_split_model_are_one_model(tmp_path: Path) -> None:
    first, *_ = parts(tmp_path, (), TENSORS[:3], TENSORS[3:])
    model = gguf.look(first)

    assert [tensor.name for tensor in model.tensors] == [name for name, *_ in TENSORS]
    assert [len(part.tensors) for part in model.parts] == [0, 3, 1]
    assert (model.architecture, model.vocabulary_size) == ("llama", 100)
    assert model.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_part_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    first, second, third = parts(tmp_path, (), TENSORS[:3], TENSORS[3:])
    gguf.look(first)
    os.truncate(third, third.stat().st_size - 1000)
    assert flaw(first) == (
        Flaw.TRUNCATED,
        "model file truncated: m-00003-of-00003.gguf: "
        "the header says 1.02 kB of tensors, the file has 24 bytes",
    )
    second.unlink()
    assert flaw(first) == (Flaw.MISSING, f"model file missing: there is no {second}")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split.no": ("u16", 0)}, "part 2 of 2 by its name is another by its header"),
        ({"split.count": ("u16", 3)}, "part 2 of 2 by its name is another by its header"),
        ({"split.no": ("string", "1")}, "part 2 of 2 by its name is another by its header"),
    ],
)
def test_parts_that_do_not_belong_together_are_corrupt(
    tmp_path: Path, changed: dict[str, Item], words: str
) -> None:
    first, _ = parts(tmp_path, TENSORS[:3], TENSORS[3:], **changed)

    assert flaw(first) == (Flaw.CORRUPT, f"model file corrupt: {first.name}: {words}")


def test_parts_of_two_models_are_told_by_their_tensors(tmp_path: Path) -> None:
    first, second = parts(tmp_path, TENSORS[:3], TENSORS[3:])
    write_sparse(second, split(2, 1, 4), TENSORS[2:])
    assert "its parts have 5 tensors, the first one tells of 4" in flaw(first)[1]
    write_sparse(second, split(2, 1, 4), TENSORS[2:3])
    assert 'tensor "blk.0.ffn_up.weight" is in two parts' in flaw(first)[1]


def test_a_part_under_another_name_says_what_it_should_be(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "renamed.gguf", {**SMALL, **split(3, 1, 9)})
    assert flaw(path) == (
        Flaw.CORRUPT,
        "model file corrupt: renamed.gguf: "
        "it is part 2 of 3: its name must end in -00002-of-00003.gguf",
    )


def test_a_name_that_only_looks_like_a_part_is_left_to_the_engine(tmp_path: Path) -> None:
    for number in (1, 2):
        write_sparse(tmp_path / f"m-{number:05}-of-00002.gguf")
    first = tmp_path / "m-00001-of-00002.gguf"

    assert flaw(first)[0] is Flaw.UNKNOWN
    gguf.require_loadable(first)
    impossible = write_sparse(tmp_path / "m-00003-of-00002.gguf")
    assert len(gguf.look(impossible).parts) == 1


# --- a server of a daemon


def llama_server(home: Home) -> Path:
    """A stack with one stand-in for llama-server; its model file."""
    (port,) = free_ports(1)
    binary = home.root / "llama-server"
    command = shlex.join([sys.executable, str(STUBS / "upstream.py"), "--name", "chat"])
    binary.write_text(f'#!/bin/sh\nexec {command} --port {port} "$@"\n')
    binary.chmod(0o700)
    model = write_sparse(home.root / "m.gguf")
    home.write(
        f'[service.chat]\nkind = "llama-server"\nmodel = "{model}"\nbinary = "{binary}"\n'
        f"port = {port}\n[route.chat-7b]\nservices = ['chat']\n"
    )
    return model


def test_a_model_that_was_damaged_under_a_server_fails_its_next_start_at_once(home: Home) -> None:
    model = llama_server(home)
    home.start()
    os.truncate(model, model.stat().st_size - 2000)
    old = home.service("chat")
    os.kill(old["pid"], signal.SIGKILL)
    failed = home.wait_state("chat", "failed")
    assert failed["why"].startswith(
        "model file truncated: m.gguf: the header says 17.1 kB of tensors, the file has 15.1 kB"
    )
    assert failed["pid"] is None
    write_sparse(model)
    home.start()
    assert home.wait_replaced(old)["state"] == "ready"
    model.unlink()
    assert home.cli("restart", "chat").returncode == 1
    why = home.wait_state("chat", "failed")["why"]
    assert why.startswith(f"model file missing: there is no {model}")
    assert home.cli("stop").returncode == 0
    assert home.processes() == []


def test_a_server_is_adopted_whatever_became_of_its_model_file(home: Home) -> None:
    model = llama_server(home)
    home.start()
    before = home.service("chat")
    os.truncate(model, model.stat().st_size - 2000)
    assert home.cli("restart", "--daemon").returncode == 0
    wait_until(lambda: home.service("chat")["state"] == "ready", "chat is adopted")
    assert home.service("chat")["pid"] == before["pid"]
    assert home.cli("stop").returncode == 0
    assert home.processes() == []
