"""What was chosen over a profile: how it is applied, kept and printed."""

from pathlib import Path

import pytest
from msgspec import structs

from llmsup.choosing import Chosen
from llmsup.cli.switch import lines, words
from llmsup.config.choice import NOTHING, Choice
from llmsup.config.load import Loaded, load
from llmsup.config.paths import paths
from llmsup.control.wire import SwitchProgress
from llmsup.host import choices, memory, procfs

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


def test_the_profile_that_was_switched_to_is_meant_until_another_is_started(
    tmp_path: Path,
) -> None:
    home = paths({"LLMSUP_HOME": str(tmp_path)})
    home.profiles.mkdir(parents=True)
    home.state.mkdir(parents=True, exist_ok=True)
    for name in ("work", "other"):
        (home.profiles / f"{name}.toml").touch()
    environ = {"LLMSUP_PROFILE": "other"}
    assert choices.profile_meant(home, environ) == "other"

    tried = choices.Trial("/old.toml", "/new.toml", "work", 1.0, "boot")
    Chosen(home.choices, "/p.toml").try_out(tried)
    assert choices.profile_meant(home, environ) == "other", "the old one has gone"
    (tmp_path / "old.toml").touch()
    old = structs.replace(tried, old=str(tmp_path / "old.toml"))
    kept = Chosen(home.choices, "/p.toml")
    kept.try_out(old)
    assert choices.profile_meant(home, environ) == old.old, "it is not over"
    kept.end_trial("work")
    assert kept.trial is None
    assert choices.profile_meant(home, environ) == "work"

    choices.note_started(home, home.profiles / "work.toml")
    assert choices.profile_meant(home, environ) == "work"
    (home.profiles / "work.toml").rename(home.profiles / "away.toml")
    choices.note_started(home, home.profiles / "other.toml")
    assert choices.profile_meant(home, environ) == "other", "its file is not there"
    (home.profiles / "away.toml").rename(home.profiles / "work.toml")
    assert choices.profile_meant(home, environ) == "work"
    choices.note_started(home, home.profiles / "other.toml")
    assert choices.load(home.choices) == choices.Choices()


def test_a_trial_is_undone_by_the_profile_before_it_and_forgotten_by_others(
    tmp_path: Path,
) -> None:
    home = paths({"LLMSUP_HOME": str(tmp_path)})
    home.state.mkdir(parents=True)
    tried = choices.Trial("/old.toml", "/new.toml", "new", 1.0, "boot")
    Chosen(home.choices, "/old.toml").try_out(tried)
    choices.note_started(home, Path("/old.toml"))
    choices.note_failed(home.choices, "it is bad")
    assert Chosen(home.choices, "/old.toml").trial == structs.replace(tried, reason="it is bad")
    choices.note_started(home, Path("/new.toml"))
    assert Chosen(home.choices, "/new.toml").trial is None


def test_under_another_profile_only_processes_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    known = memory.Remembered("down", 4, 2, deaths=(1.0,), port=8001, measured_bytes=9)
    memory.save(file, memory.Memory(procfs.boot_id(), "/p.toml", {"chat": known}))
    assert memory.load(file, "/p.toml").services == {"chat": known}
    assert memory.load(file, "/q.toml") == memory.Memory(
        procfs.boot_id(), "/q.toml", {"chat": structs.replace(known, asked="", deaths=())}
    )
    memory.save(file, memory.Memory("another boot", "/p.toml", {"chat": known}))
    assert memory.load(file, "/q.toml").services == {}


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
    of_profile: SwitchProgress = {**progress, "profile": "work"}
    assert words(of_profile).startswith("work: loading · b.gguf, 30 of 98 MiB")
    nothing: SwitchProgress = {**of_profile, "service": "", "model": "", "last_load_s": None}
    assert words(nothing) == "work: loading · 1.2 s"
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
            "warm_tokens": 0,
        }
    ) == [
        "success        yes",
        "message        chat serves b.gguf now",
        "current model  b.gguf",
        "switch time    3.2 s",
    ]
