"""What was chosen over a profile: how it is applied, kept and printed."""

from pathlib import Path

import pytest

from llmsup.choosing import Chosen
from llmsup.cli.switch import lines, words
from llmsup.config.choice import NOTHING, Choice
from llmsup.config.load import Loaded, load
from llmsup.control.wire import SwitchProgress
from llmsup.host import choices

PROFILE = """
[service.chat]
kind = "llama-server"
model = "${CHAT_MODEL:-a.gguf}"
[service.code]
kind = "llama-server"
model = "a.gguf"
[service.rag]
kind = "command"
command = ["true"]
"""


def loaded(directory: Path, choice: Choice, *overrides: str, mode: str = "dual") -> Loaded:
    for name in ("a", "b", "c"):
        (directory / f"{name}.gguf").write_bytes(b"GGUF")
    path = directory / "p.toml"
    path.write_text(f'mode = "{mode}"\n{PROFILE}')
    return load(
        path,
        environ={"CHAT_MODEL": "c.gguf"},
        overrides=overrides,
        config_dir=directory,
        choices={str(path): choice},
    )


def models(found: Loaded) -> list[str]:
    return [Path(getattr(each, "model", "-")).name for each in found.profile.service.values()]


def test_a_choice_is_above_the_environment_and_below_a_flag(tmp_path: Path) -> None:
    choice = Choice(models={"chat": str(tmp_path / "b.gguf")})
    assert models(loaded(tmp_path, NOTHING)) == ["c.gguf", "a.gguf", "-"]
    assert models(loaded(tmp_path, choice)) == ["b.gguf", "a.gguf", "-"]
    flagged = loaded(tmp_path, choice, "service.chat.model=a.gguf")
    assert models(flagged) == ["a.gguf", "a.gguf", "-"]


def test_what_has_no_place_in_the_profile_any_more_is_passed_over(tmp_path: Path) -> None:
    model = str(tmp_path / "b.gguf")
    choice = Choice(active="gone", models={"gone": model, "rag": model, "code": model})
    found = loaded(tmp_path, choice, mode="single")
    assert models(found) == ["c.gguf", "b.gguf", "-"]
    assert found.profile.active is None


@pytest.mark.parametrize(("mode", "active"), [("single", "code"), ("dual", None)])
def test_the_active_one_is_chosen_in_single_mode_only(
    tmp_path: Path, mode: str, active: str | None
) -> None:
    assert loaded(tmp_path, Choice(active="code"), mode=mode).profile.active == active


def test_a_model_path_with_a_dollar_sign_is_no_variable(tmp_path: Path) -> None:
    odd = tmp_path / "${HOME}.gguf"
    odd.write_bytes(b"GGUF")
    assert models(loaded(tmp_path, Choice(models={"chat": str(odd)})))[0] == "${HOME}.gguf"


def test_what_is_kept_is_found_by_the_next_one(tmp_path: Path) -> None:
    model = tmp_path / "b.gguf"
    model.write_bytes(b"GGUF")
    file = tmp_path / "choices.json"
    kept = Chosen(file, "/p.toml")
    kept.end(Choice(models={"chat": str(model)}))
    kept.begin("chat", 4)
    kept.note_load(model, 2.5)
    Chosen(file, "/other.toml").end(Choice(active="x"))

    again = Chosen(file, "/p.toml")
    assert again.choice == Choice(models={"chat": str(model)}, unfinished={"chat": 4})
    assert again.last_load_s(model) == 2.5
    assert again.last_load_s(tmp_path) is None
    assert choices.load(file).of("/other.toml") == Choice(active="x")
    model.unlink()
    assert choices.load(file).usable["/p.toml"].models == {}, "its file has gone"
    again.end()
    assert choices.load(file).of("/p.toml").models == {"chat": str(model)}, "it may come back"
    again.end(NOTHING)
    assert choices.load(file).profiles.keys() == {"/other.toml"}


def test_a_file_that_cannot_be_trusted_costs_the_choice_only(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text("{")
    assert choices.peek(file) == choices.Choices()
    assert file.exists()
    assert choices.load(file) == choices.Choices()
    assert not file.exists()


def test_only_the_last_load_times_are_kept() -> None:
    found = choices.Choices()
    for number in range(choices.LOADS_KEPT + 5):
        found = found.with_load(f"{number}.gguf", float(number))
    assert len(found.load_s) == choices.LOADS_KEPT
    assert "0.gguf" not in found.load_s
    assert found.with_load("9.gguf", 1.0).load_s["9.gguf"] == 1.0


def test_how_far_a_switch_is_in_words() -> None:
    progress = SwitchProgress(
        phase="loading",
        service="chat",
        model="b.gguf",
        elapsed_s=1.24,
        read_bytes=30 * 2**20,
        size_bytes=98 * 2**20,
        last_load_s=2.0,
        why="",
    )
    assert words(progress) == (
        "chat: loading · b.gguf, 30 of 98 MiB · took 2.0 s the last time · 1.2 s"
    )
    waiting: SwitchProgress = {**progress, "phase": "leaving", "why": "finishes its requests"}
    assert words(waiting) == "chat: leaving · 1.2 s · finishes its requests"


def test_a_switch_that_succeeded_is_printed_as_the_old_tool_did() -> None:
    assert lines(
        {
            "success": True,
            "message": "chat serves b.gguf now",
            "current_model": "b.gguf",
            "service": "chat",
            "profile": "dual",
            "switch_time_s": 3.21,
        }
    ) == [
        "success        yes",
        "message        chat serves b.gguf now",
        "current model  b.gguf",
        "switch time    3.2 s",
    ]
