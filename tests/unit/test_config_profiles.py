from pathlib import Path

import pytest

from llmsup.config.dump import MASK, document, toml
from llmsup.config.load import Loaded, load
from llmsup.config.profiles import available, default_name, find, shipped_directory
from llmsup.config.schema import Command, LlamaServer, Profile, Restart
from llmsup.core.routing import Route, effective_routes
from llmsup.errors import ConfigError

MODELS = (
    "Qwen2.5-3B-Instruct-Q4_K_M.gguf",
    "qwen2.5-coder-7b-instruct-q4_k_m.gguf",
    "nomic-embed-text-v1.5.Q8_0.gguf",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma-3-270m-q4_k_m.gguf",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    return tmp_path


def shipped(home: Path, name: str, **environ: str) -> Loaded:
    for model in MODELS:
        (home / model).write_bytes(b"GGUF")
    return load(name, environ=environ, overrides=[f'models.dirs=["{home}"]'], config_dir=home)


def test_the_default_profile_is_dual_or_what_the_environment_says() -> None:
    assert default_name({}) == "dual"
    assert default_name({"LLMSUP_PROFILE": ""}) == "dual"
    assert default_name({"LLMSUP_PROFILE": "mine"}) == "mine"


def test_own_profiles_hide_shipped_ones(home: Path) -> None:
    own = home / "profiles" / "dual.toml"
    own.write_text("# my own\n")
    (home / "profiles" / "dir.toml").mkdir()

    rows = {row.name: (row.origin, row.summary) for row in available(home)}

    assert find("dual", home) == own
    assert rows["dual"] == ("yours", "my own")
    assert rows["dir"] == ("yours", "")
    assert find("single", home) == shipped_directory() / "single.toml"
    assert rows["single"][0] == "shipped"


def test_a_path_is_a_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "x.toml"
    path.touch()
    monkeypatch.chdir(home)

    assert find("x.toml", home) == find("./x.toml", home) == find(path, home) == path


def test_an_unknown_name_lists_the_known_ones(home: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        find("duall", home)

    assert str(raised.value) == 'profile "duall": no such profile; did you mean "dual"?'
    assert "demo, dual, single" in raised.value.hint


@pytest.mark.parametrize("name", ["", "..", "x\0y", "x" * 5000])
def test_a_strange_name_is_an_unknown_name(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such profile"):
        find(name, home)


@pytest.mark.parametrize("name", ["dual", "single", "demo"])
def test_a_shipped_profile_is_sound_and_says_what_it_is(home: Path, name: str) -> None:
    profile = shipped(home, name).profile

    assert {"chat", "code"} <= set(profile.service)
    assert next(row.summary for row in available(home) if row.name == name)


def test_the_compose_set_up_s_variables_reach_the_dual_profile(home: Path) -> None:
    profile = shipped(home, "dual", CHAT_N_GPU_LAYERS="999", CODE_N_GPU_LAYERS="12").profile

    layers = [s.gpu_layers for s in profile.service.values() if isinstance(s, LlamaServer)]
    assert layers == [999, 12, 0]


@pytest.mark.parametrize("name", ["dual", "single", "demo"])
def test_what_is_shown_loads_as_the_same_profile(home: Path, name: str) -> None:
    profile = shipped(home, name).profile
    path = home / "shown.toml"
    path.write_text(toml(document(profile)))

    assert load(path, environ={}, config_dir=home).profile == profile


def test_odd_text_and_durations_survive_being_shown(home: Path) -> None:
    service = Command(
        command=("x", 'a"b\\c', "$HOME ${X}\n\t\x7f é 😀"),
        restart=Restart(backoff_s=0.0015, window_s=61.25),
    )
    profile = Profile(service={"x": service})
    path = home / "shown.toml"
    path.write_text(toml(document(profile)))

    assert load(path, environ={}, config_dir=home).profile.service == profile.service


def test_secrets_are_masked() -> None:
    service = Command(
        command=("rag", "--api-key", "s3cret", "--hf-token=s3cret", "--max-tokens", "5"),
        env={"OPENAI_API_KEY": "s3cret", "db_password": "s3cret", "LEVEL": "debug"},
    )

    table = document(Profile(service={"rag": service}))

    assert "s3cret" not in toml(table)
    assert table["service"]["rag"]["env"] == {
        "OPENAI_API_KEY": MASK,
        "db_password": MASK,
        "LEVEL": "debug",
    }
    assert table["service"]["rag"]["command"][-2:] == ["--max-tokens", "5"]


def test_every_model_has_a_route_under_its_own_name_unless_it_is_taken(home: Path) -> None:
    assert effective_routes(shipped(home, "dual").profile) == (
        Route("chat-7b", ("chat", "code"), ("gpt-4o-mini",)),
        Route("code-7b", ("code", "chat"), ("gpt-4o",)),
        Route("chat", ("chat",)),
        Route("code", ("code",)),
        Route("embedding", ("embedding",)),
    )
    assert [route.name for route in effective_routes(shipped(home, "demo").profile)] == [
        "chat",
        "code",
    ]
