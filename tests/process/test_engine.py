"""Asking a llama-server what it understands: once, whatever kind of program it is."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from llmsup.config.schema import LlamaServer
from llmsup.core.options import Options
from llmsup.host import binaries, engine, procfs
from llmsup.services import llama_server
from tests.gguf_files import gguf
from tests.home import STUBS, Home, free_ports
from tests.unit.test_llama_help import NOW, SPRING_2025

REAL = binaries.llama_server(None, os.environ)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "engines.json"


def program(path: Path, *lines: str) -> str:
    """A stand-in that also notes that it was asked."""
    path.write_text("\n".join(["#!/bin/sh", f'echo "$1" >> "{path}.asked"', *lines, ""]))
    path.chmod(0o700)
    return str(path)


def server(path: Path, version: str = "version: 6123 (ab12cd3)") -> str:
    path.with_suffix(".help").write_text(NOW)
    words = (
        f'case "$1" in --help) cat "{path.with_suffix(".help")}";; *) echo "{version}" >&2;; esac'
    )
    return program(path, words)


def asked(path: str) -> list[str]:
    noted = Path(f"{path}.asked")
    return noted.read_text().split() if noted.exists() else []


def test_the_real_one_knows_every_flag_that_it_is_given(cache: Path) -> None:
    known = engine.learn(REAL, cache)

    assert known.flags is not None
    assert known == engine.look(REAL, cache)
    for layers in (0, 9):
        for is_unified in (True, False):
            options = Options(layers, kv_unified=is_unified)
            arguments = {
                each: llama_server.launch(
                    LlamaServer(model="/m.gguf"),
                    name="x",
                    binary=REAL,
                    port=1,
                    options=options,
                    flags=each,
                ).argv
                for each in (None, known.flags)
            }
            assert arguments[None] == arguments[known.flags]


def test_a_program_is_asked_once(tmp_path: Path, cache: Path) -> None:
    binary = server(tmp_path / "llama-server")
    assert engine.look(binary, cache) is None

    first = engine.learn(binary, cache)
    again = engine.learn(binary, cache)

    assert first == again == engine.look(binary, cache)
    assert first.build.startswith("6123 (ab12cd3) ")
    assert first.flags is not None
    assert asked(binary) == ["--help", "--version"]


def test_several_programs_are_kept_apart(tmp_path: Path, cache: Path) -> None:
    old, new = (
        server(tmp_path / "old", "version: 1 (a)"),
        server(tmp_path / "new", "version: 2 (b)"),
    )
    engine.learn(old, cache)
    engine.learn(new, cache)

    builds = [known.build for each in (old, new) if (known := engine.look(each, cache))]
    assert [build.split(" (")[0] for build in builds] == ["1", "2"]


@pytest.mark.parametrize("name", ["llama-server", "libllama.so.0"])
def test_another_program_or_library_is_asked_again(tmp_path: Path, cache: Path, name: str) -> None:
    binary = server(tmp_path / "llama-server")
    library = tmp_path / "libllama.so.0"
    library.write_text("old")
    before = engine.learn(binary, cache)

    with (tmp_path / name).open("a") as file:
        file.write("\n# newer\n")

    assert engine.look(binary, cache) is None
    assert engine.learn(binary, cache).build != before.build


def test_the_same_program_installed_anew_is_the_same_build(tmp_path: Path, cache: Path) -> None:
    before = engine.learn(server(tmp_path / "llama-server"), cache)
    (tmp_path / "llama-server").unlink()

    assert engine.learn(server(tmp_path / "llama-server"), cache) == before


@pytest.mark.parametrize(
    "words",
    [
        "exit 1",
        "echo Traceback >&2; exit 1",
        "kill -SEGV $$",
        "head -c 300000 /dev/urandom",
        "yes",
        "exec yes --",
    ],
)
def test_one_that_tells_nothing_of_use_is_not_asked_again(
    tmp_path: Path, cache: Path, words: str
) -> None:
    binary = program(tmp_path / "llama-server", words)

    known = engine.learn(binary, cache)

    assert known.flags is None
    assert known.build
    assert engine.learn(binary, cache) == known
    assert asked(binary) == ["--help"]


def test_one_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "TIMEOUT_S", 1.0)
    pids = tmp_path / "pids"
    binary = program(
        tmp_path / "llama-server",
        f"sleep 600 & echo $! $$ > {pids}",
        f"cat '{tmp_path}/x.help'",
        "wait",
    )
    (tmp_path / "x.help").write_text(NOW)

    assert engine.learn(binary, cache).flags is None
    assert engine.look(binary, cache) is None
    deadline = time.monotonic() + 20
    for pid in map(int, pids.read_text().split()):
        while b"State:\tZ" not in (state := procfs.read(pid, "status")) and state:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_one_that_is_not_there_or_no_program(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for path in (tmp_path / "absent", tmp_path / "text", tmp_path):
        assert engine.learn(str(path), cache).flags is None
        assert engine.look(str(path), cache) is None


def test_a_cache_that_cannot_be_read_or_written_is_no_trouble(tmp_path: Path, cache: Path) -> None:
    binary = server(tmp_path / "llama-server")
    cache.write_text("{")
    assert engine.learn(binary, cache).flags is not None
    assert engine.look(binary, cache) is not None

    nowhere = tmp_path / "absent" / "engines.json"
    assert engine.learn(binary, nowhere).flags is not None
    assert engine.look(binary, nowhere) is None


def test_it_is_asked_without_a_card(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LLAMA_ARG_FIT", "on")
    engine.learn(program(tmp_path / "x", f'env > "{tmp_path}/environ"'), cache)

    environ = (tmp_path / "environ").read_text().splitlines()
    assert "CUDA_VISIBLE_DEVICES=" in environ
    assert not any(line.startswith("LLAMA_ARG_") for line in environ)


def test_an_older_server_is_started_without_the_flags_that_it_does_not_have(home: Home) -> None:
    """Given a build that ends where it meets a flag that its help does not list."""
    help_text, model, (port,) = home.root / "help", home.root / "m.gguf", free_ports(1)
    help_text.write_text(SPRING_2025)
    model.write_bytes(gguf())
    upstream = shlex.join([sys.executable, str(STUBS / "upstream.py"), "--name", "chat"])
    binary = program(
        home.root / "llama-server",
        f'[ "$1" = --help ] && exec cat "{help_text}"',
        'for word; do case "$word" in --*) grep -q -e "$word" '
        f'"{help_text}" || [ "$word" = --host ] || [ "$word" = --alias ] || exit 1; esac; done',
        f'exec {upstream} "$@"',
    )
    home.write(
        f'[service.chat]\nkind = "llama-server"\nmodel = "{model}"\nbinary = "{binary}"\n'
        f'port = {port}\nflash_attn = "on"\n'
    )
    home.start()

    words = procfs.read(home.service("chat")["pid"], "cmdline").decode().split("\0")
    assert words[words.index("--ctx-size") + 1] == "4096"
    assert words[-2:] == ["--flash-attn", ""]
    assert not {"--fit", "--kv-unified", "--no-kv-unified", "--verbosity"} & set(words)


def picky(home: Home, name: str, help_text: str) -> None:
    """A build at its place in `home` that ends where it meets a flag that its help does not list.

    It comes as a new file, as packages are installed.
    """
    told, binary = home.root / f"{name}.help", home.root / "llama-server"
    told.write_text(help_text)
    upstream = shlex.join([sys.executable, str(STUBS / "upstream.py"), "--name", "chat"])
    fresh = program(
        binary.with_suffix(".new"),
        f'[ "$1" = --help ] && exec cat "{told}"',
        'for word; do case "$word" in --*) grep -q -e "$word" '
        f'"{told}" || [ "$word" = --host ] || [ "$word" = --alias ] || exit 1; esac; done',
        f'exec {upstream} "$@"',
    )
    Path(fresh).replace(binary)


@pytest.mark.parametrize("gpu_layers", ['"auto"', "0"])
def test_a_server_that_is_replaced_under_the_daemon_is_asked_before_its_next_start(
    home: Home, gpu_layers: str
) -> None:
    """Given an older build in place of the one that was there when the daemon began."""
    model, (port,) = home.root / "m.gguf", free_ports(1)
    model.write_bytes(gguf())
    picky(home, "new", NOW)
    home.write(
        f'[service.chat]\nkind = "llama-server"\nmodel = "{model}"\nport = {port}\n'
        f'binary = "{home.root / "llama-server"}"\ngpu_layers = {gpu_layers}\n'
    )
    home.start()
    before = home.service("chat")
    picky(home, "old", SPRING_2025)
    os.kill(before["pid"], signal.SIGKILL)
    after = home.wait_replaced(before)

    assert after["restarts"] == 1
    words = procfs.read(after["pid"], "cmdline").decode().split("\0")
    assert "--no-kv-unified" not in words
