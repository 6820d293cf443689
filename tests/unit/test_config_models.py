import os
import re
import sys
from pathlib import Path

import pytest

from llmsup.config.interpolated import Interpolated
from llmsup.config.models import find_model, package_directories
from llmsup.config.resolve import read_api_keys


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF\3\0\0\0")
    return path


def test_directories_are_searched_in_order_then_the_profile_s_own(tmp_path: Path) -> None:
    search = (str(tmp_path / "a"), str(tmp_path / "b"))
    beside = gguf(tmp_path / "m.gguf")
    assert find_model("m.gguf", search, tmp_path) == beside
    second = gguf(tmp_path / "b" / "m.gguf")
    assert find_model("m.gguf", search, tmp_path) == second
    first = gguf(tmp_path / "a" / "m.gguf")
    assert find_model("m.gguf", search, tmp_path) == first
    assert find_model(str(second), search, tmp_path) == second


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = gguf(tmp_path / "models" / "m.gguf")

    assert find_model("~/models/m.gguf", (), Path("/")) == path


def test_the_home_of_nobody_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='"~nobody-here/x": there is no such home directory'):
        find_model("~nobody-here/x", (), tmp_path)


def test_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights_pkg").mkdir()
    (tmp_path / "weights_pkg" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert package_directories("weights_pkg") == (tmp_path / "weights_pkg",)
    assert "weights_pkg" not in sys.modules


@pytest.mark.parametrize("name", ["", ".", "a.b", "../x", "no_such_package_here", "__main__", "os"])
def test_what_is_no_installed_package_has_no_directory(name: str) -> None:
    assert package_directories(name) == ()


def test_a_missing_model_says_where_it_was_looked_for(tmp_path: Path) -> None:
    search = (str(tmp_path / "a"), "package:absent_pkg")

    expected = f'no file "m.gguf" in {tmp_path}/a, {tmp_path} (package not installed: absent_pkg)'
    with pytest.raises(ValueError, match=re.escape(expected)):
        find_model("m.gguf", search, tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("version https://git-lfs")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("text", "is not a GGUF file: it starts with b'vers'"),
        ("empty", "is empty"),
        ("folder", "is a directory, not a model file"),
        ("pipe", "is a named pipe, not a model file"),
        (str(tmp_path / "gone"), "no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            find_model(name, (), tmp_path)


def parts(directory: Path, *numbers: int) -> None:
    for number in numbers:
        gguf(directory / f"m-{number:05}-of-00003.gguf")


def test_a_split_model_is_named_by_its_first_part(tmp_path: Path) -> None:
    parts(tmp_path, 1, 2, 3)

    first = tmp_path / "m-00001-of-00003.gguf"
    assert find_model(first.name, (), tmp_path) == first
    with pytest.raises(ValueError, match="is part 2 of 3; name the first part"):
        find_model("m-00002-of-00003.gguf", (), tmp_path)


def test_a_split_model_needs_all_its_parts(tmp_path: Path) -> None:
    parts(tmp_path, 1)
    name = "m-00001-of-00003.gguf"

    with pytest.raises(ValueError, match="has 3 parts; beside it part 2 and 1 more is missing"):
        find_model(name, (), tmp_path)
    parts(tmp_path, 2)
    with pytest.raises(ValueError, match="has 3 parts; beside it part 3 is missing"):
        find_model(name, (), tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").touch()
    with pytest.raises(ValueError, match=r"part 3 of .* is empty"):
        find_model(name, (), tmp_path)


def test_places_from_variables_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    directory = Interpolated(str(tmp_path), source="${DIR}")
    for model, dirs in (
        (Interpolated("s3cret", source="${M}"), ()),
        (Interpolated("/s3cret", source="${M}"), ()),
        (Interpolated(str(tmp_path / "text"), source="${M}"), ()),
        ("text", (directory,)),
        ("none", (directory,)),
    ):
        with pytest.raises(ValueError, match="the value of") as raised:
            find_model(model, dirs, Path("/"))

        assert "s3cret" not in str(raised.value)
        assert str(tmp_path) not in str(raised.value)


def keys_file(tmp_path: Path, content: str, mode: int = 0o600) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(content)
    path.chmod(mode)
    return path


def test_api_keys_are_one_a_line(tmp_path: Path) -> None:
    path = keys_file(tmp_path, "# editors\nalpha\n\n  beta  \nalpha\n")

    assert read_api_keys(path) == ("alpha", "beta")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("", 0o600, "no keys"),
        ("# none\n\n", 0o600, "no keys"),
        ("alpha", 0o644, "chmod 600"),
        ("alpha", 0o660, "chmod 600"),
        ("two words", 0o600, "line 1: a key is visible ASCII"),
        ("a\nschlüssel", 0o600, "line 2: a key is visible ASCII"),
    ],
)
def test_a_keys_file_that_is_useless_or_open_is_refused(
    tmp_path: Path, content: str, mode: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        read_api_keys(keys_file(tmp_path, content, mode))

    assert "two words" not in str(raised.value)


def test_a_missing_keys_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_api_keys(tmp_path / "none")
