import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmsup.config.dump import document, toml
from llmsup.config.load import Loaded, load
from llmsup.config.masking import MASK, masked, masked_variable
from llmsup.config.profiles import available, default_name, find, shipped_directory
from llmsup.config.schema import Command, LlamaServer, Profile, Restart
from llmsup.config.schema import Route as RouteTable
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
    assert "dual" not in raised.value.hint
    with pytest.raises(ConfigError, match="demo, dual, single"):
        find("zzz", home)


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


def test_the_home_of_nobody_is_no_path(home: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such home directory"):
        find("~no-such-user/x.toml", home)


def test_a_shipped_profile_has_its_env_file_in_the_configuration(home: Path) -> None:
    (home / ".env").write_text("CODE_N_GPU_LAYERS=7\n")

    service = shipped(home, "dual").profile.service["code"]

    assert isinstance(service, LlamaServer)
    assert service.gpu_layers == 7


@pytest.mark.parametrize("name", ["dual", "single", "demo"])
def test_what_is_shown_loads_as_the_same_profile(home: Path, name: str) -> None:
    profile = shipped(home, name).profile
    path = home / "shown.toml"
    path.write_text(toml(document(profile)))

    assert load(path, environ={}, config_dir=home).profile == profile


def test_odd_text_and_durations_survive_being_shown(home: Path) -> None:
    service = Command(
        command=("x", 'a"b\\c', "$HOME ${X}\n\t\x7f é 😀"),
        cwd=str(home),
        restart=Restart(backoff_s=0.0015, window_s=61.25),
    )
    profile = Profile(service={"x": service})
    path = home / "shown.toml"
    path.write_text(toml(document(profile)))

    assert load(path, environ={}, config_dir=home).profile.service == profile.service


@given(st.lists(st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1)))
@example(["x" * 128, "a$b", 'q"uo\\te', "d.o.t", "${X}", "'", "#"])
def test_any_name_survives_being_shown(names: list[str]) -> None:
    names = [name[:128] for name in names if "\x7f" not in name]
    services = {f"{number:032}": Command(command=("x",), cwd="/") for number in range(2)}
    routes = {name: RouteTable(services=("0" * 32,), aliases=(name,)) for name in names}
    profile = Profile(service={**services}, route=routes)

    assert tomllib.loads(toml(document(profile))).get("route", {}).keys() == routes.keys()


def test_a_long_name_survives_being_shown_and_loaded(home: Path) -> None:
    variable = "V" * 100
    service = Command(command=("x",), port=1, cwd=str(home), env={variable: "1"})
    route = RouteTable(services=("s",), aliases=("b" * 128,))
    profile = Profile(service={"s": service}, route={"a$" * 64: route})
    path = home / "shown.toml"
    path.write_text(toml(document(profile)))

    loaded = load(path, environ={}, config_dir=home).profile

    assert (loaded.service, loaded.route) == (profile.service, profile.route)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--api-key", "s3 cret"], ["--api-key", MASK]),
        (["--api_key=s3 cret"], [f"--api_key={MASK}"]),
        (["-hft", "s3cret"], ["-hft", MASK]),
        (["--hf_token", "s3cret"], ["--hf_token", MASK]),
        (["--password", "s3cret"], ["--password", MASK]),
        (["PGPASSWORD=s3cret"], [f"PGPASSWORD={MASK}"]),
        (["http://u:s3cret@h/x@y"], [f"http://{MASK}@h/x@y"]),
        (["-H", "Authorization: Bearer s3cret"], ["-H", f"Authorization: {MASK}"]),
        (["-H", "X-Api-Key:s3cret"], ["-H", f"X-Api-Key:{MASK}"]),
        (['{"api_key": "s3cret"}'], [f'{{"api_key": "{MASK}"}}']),
        (
            ["A=1 TOKEN=s3cret rag --hf-token 's3 cret' -p 1 'Authorization: s3cret' x"],
            [f"A=1 TOKEN={MASK} rag --hf-token {MASK} -p 1 'Authorization: {MASK}' x"],
        ),
        (["--max-tokens", "5", "--tokenizer=x", "--bypass=1"], None),
        (["--api-key-file", "/k", "--author", "me", "A=2", "http://h:1/@x", ""], None),
    ],
)
def test_secrets_in_a_command_line_are_masked(argv: list[str], shown: list[str] | None) -> None:
    assert masked(argv) == (argv if shown is None else shown)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("DB_PASS", "s3cret", MASK),
        ("DB_PWD", "s3cret", MASK),
        ("BASIC_AUTH", "s3cret", MASK),
        ("aws_credentials", "s3cret", MASK),
        ("DATABASE_URL", "postgres://me:s3cret@h/db", f"postgres://{MASK}@h/db"),
        ("LEVEL", "debug", "debug"),
    ],
)
def test_secrets_in_variables_are_masked(name: str, value: str, shown: str) -> None:
    assert masked_variable(name, value) == shown


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
