import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmsup.config.load import load
from llmsup.errors import ConfigError, Problem

GOOD = """
[models]
dirs = ["models"]

[service.chat]
kind = "llama-server"
model = "chat.gguf"
port = 8001

[service.rag]
kind = "command"
command = ["rag"]
depends_on = ["chat"]

[route.chat-7b]
services = ["chat"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "chat.gguf").write_bytes(b"GGUF")
    return tmp_path


def outcome(home: Path, *overrides: str) -> tuple[Problem, ...]:
    try:
        load(home / "p.toml", environ={}, overrides=overrides, config_dir=home)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"mode = \n", "not valid TOML: Invalid value (at line 1, column 8)"),
        (b"ok = 1\n\xff\n", "not UTF-8 text (line 2)"),
        ("mode = 'dual'".encode("utf-16"), "not UTF-8 text"),
        (b"#" * 10_000_000, "too large: 10000000 bytes"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a" + b".a" * 3000 + b" = 1", "nested too deeply"),
        (b"a = " + b"1" * 5000, "Exceeds the limit"),
        (b"a = 1\na = 2", "not valid TOML"),
    ],
)
def test_a_file_that_is_no_profile_is_one_problem(home: Path, content: bytes, words: str) -> None:
    path = home / "p.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as raised:
        load(path, environ={}, config_dir=home)

    [problem] = raised.value.problems
    assert problem.file == str(path)
    assert words in problem.message


@pytest.mark.parametrize("content", ["", "# nothing\n", "\ufeffmode = 'dual'\r\n", "[service]"])
def test_a_profile_needs_services(home: Path, content: str) -> None:
    (home / "p.toml").write_text(content)

    assert any(problem.message.startswith("no services") for problem in outcome(home))


def test_what_is_not_a_regular_file_is_refused_without_opening_it(home: Path) -> None:
    os.mkfifo(home / "pipe.toml")
    (home / "folder.toml").mkdir()
    (home / "loop.toml").symlink_to("/dev/zero")
    for name, words in (
        ("pipe.toml", "a named pipe"),
        ("folder.toml", "a directory"),
        ("loop.toml", "a device"),
        ("none.toml", "no such file"),
        ("x" * 5000 + ".toml", "no such file"),
        ("nul\0.toml", "no such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(home / name, environ={}, config_dir=home)


def test_a_profile_without_permission_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (home / "p.toml").write_text(GOOD)
    monkeypatch.setattr(Path, "open", refuse)

    with pytest.raises(ConfigError) as raised:
        load(home / "p.toml", environ={}, config_dir=home)

    assert raised.value.problems == (
        Problem(str(home / "p.toml"), "", "cannot be read: Permission denied"),
    )


SCALARS = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(), st.datetimes(), st.just("${HOME}")
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [at, *(place for name, item in entries for place in places(item, (*at, name)))]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_profile_is_loaded_or_refused(home: Path, data: st.DataObject) -> None:
    """Whatever stands in any place of a profile, nothing but a ConfigError comes out."""
    raw = tomllib.loads(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(places(raw)[1:]))
        table: Any = raw
        for part in place[:-1]:
            table = table[part]
        if data.draw(st.booleans()) and isinstance(table, dict):
            table[data.draw(st.sampled_from(["kind", "port", "args", "env", "x\n"]))] = data.draw(
                TREES
            )
        else:
            table[place[-1]] = data.draw(TREES)
    (home / "p.toml").write_text(GOOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda _: raw)
        found = outcome(home)
    assert all(len(str(problem).splitlines()) == 1 for problem in found)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_refused_in_words(home: Path, content: bytes) -> None:
    (home / "p.toml").write_bytes(content)

    with pytest.raises(ConfigError):
        load(home / "p.toml", environ={}, config_dir=home)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(override=st.text(max_size=60))
def test_any_override_is_taken_or_refused(home: Path, override: str) -> None:
    (home / "p.toml").write_text(GOOD)

    found = outcome(home, override)
    assert all(problem.file.startswith("--set") for problem in found)
    assert all(len(str(problem).splitlines()) == 1 for problem in found)
