import json
from pathlib import Path

import msgspec
import pytest

from llmsup.config.load import Loaded, load, look
from llmsup.config.schema import Command, LlamaServer, Qdrant
from llmsup.errors import ConfigError

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
port = 8002
depends_on = ["chat"]

[route.chat-7b]
services = ["chat"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "chat.gguf").write_bytes(b"GGUF\3\0\0\0")
    return tmp_path


def loaded(home: Path, text: str, *overrides: str, **environ: str) -> Loaded:
    path = home / "p.toml"
    path.write_text(text)
    return load(path, environ=environ, overrides=overrides, config_dir=home / "config")


def problems(home: Path, text: str, *overrides: str, **environ: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        loaded(home, text, *overrides, **environ)
    return {problem.key: problem.message for problem in raised.value.problems}


def chat(profile: Loaded) -> LlamaServer:
    service = profile.profile.service["chat"]
    assert isinstance(service, LlamaServer)
    return service


def test_a_good_profile_has_absolute_paths(home: Path) -> None:
    result = loaded(home, GOOD)

    assert (result.name, result.path) == ("p", home / "p.toml")
    assert chat(result).model == str(home / "models" / "chat.gguf")
    assert result.profile.models.dirs == (str(home / "models"),)
    assert list(result.profile.service) == ["chat", "rag"]


def test_all_problems_are_listed_at_once_with_file_and_key(home: Path) -> None:
    text = """
mode = "duel"
[service.chat]
kind = "llama-server"
model = "absent.gguf"
gpu_layers = "some"
gpu_layer = 3
port = "8001"
[service.chat.restart]
backof = "1s"
[service.rag]
kind = "comand"
[service.web]
kind = "command"
command = []
depends_on = ["rag", "chta"]
[route.r]
services = ["chat", "rag", "nobody"]
"""

    found = problems(home, text)

    assert set(found) == {
        "mode",
        "service.chat.model",
        "service.chat.gpu_layers",
        "service.chat.gpu_layer",
        "service.chat.port",
        "service.chat.restart.backof",
        "service.rag.kind",
        "service.web.command",
        "service.web.depends_on[1]",
        "route.r.services[2]",
    }
    assert found["service.chat.gpu_layer"] == 'unknown key; did you mean "gpu_layers"?'
    assert found["service.web.depends_on[1]"] == 'no service "chta"; did you mean "chat"?'


def test_a_problem_reads_file_key_message(home: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(home, GOOD.replace("8001", "0"))

    assert str(raised.value) == (
        f"{home}/p.toml: service.chat.port: expected an integer from 1 to 65535, got 0"
    )
    assert raised.value.exit_code == 2


def test_precedence_is_flag_environment_env_file_profile_default(home: Path) -> None:
    text = GOOD.replace("port = 8001", 'port = 8001\nctx_size = "${CTX:-1000}"')

    assert chat(loaded(home, GOOD)).ctx_size == 4096
    assert chat(loaded(home, text)).ctx_size == 1000
    (home / ".env").write_text("CTX=2000\n")
    assert chat(loaded(home, text)).ctx_size == 2000
    assert chat(loaded(home, text, CTX="3000")).ctx_size == 3000
    assert chat(loaded(home, text, "service.chat.ctx_size=4000", CTX="3000")).ctx_size == 4000


def test_an_env_file_may_be_named_and_then_must_be_there(home: Path) -> None:
    text = 'env_file = "${WHERE:-my.env}"\n' + GOOD.replace("8001", '"${PORT}"')

    found = problems(home, text)
    assert "no such file" in found["env_file"]
    assert "${PORT} is not set" in found["service.chat.port"]
    (home / "my.env").write_text("export PORT=8011  # comment\nQUOTED='$PORT'\n")
    assert chat(loaded(home, text)).port == 8011
    (home / "other.env").write_text("PORT=8012")
    assert chat(loaded(home, text, WHERE="other.env")).port == 8012


@pytest.mark.parametrize("content", [b"PORT=1\n'quoted\n", b"\xff\xfe", b"A=1\n" * 300_000])
def test_an_unreadable_env_file_is_a_problem(home: Path, content: bytes) -> None:
    (home / ".env").write_bytes(content)

    with pytest.raises(ConfigError) as raised:
        loaded(home, GOOD)

    [problem] = raised.value.problems
    assert problem.file.startswith(str(home / ".env"))


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("service.chat.port=9001", "port", 9001),
        ("service.chat.gpu_layers=all", "gpu_layers", "all"),
        ('service.chat.gpu_layers="all"', "gpu_layers", "all"),
        ("service.chat.gpu_layers=auto", "gpu_layers", "auto"),
        ("service.chat.gpu_layers=-1", "gpu_layers", "all"),
        ("service.chat.args=['--threads', '2']", "args", ("--threads", "2")),
        ("service.chat.env.WORKERS=3", "env", {"WORKERS": "3"}),
        ("service.chat.grace_period=2s", "grace_period_s", 2.0),
        ("service.chat.pinned=true", "pinned", True),
        ("service.chat.kv_unified=false", "kv_unified", False),
    ],
)
def test_set_overrides_a_value(home: Path, override: str, attribute: str, value: object) -> None:
    assert getattr(chat(loaded(home, GOOD, override)), attribute) == value


def test_set_reaches_quoted_keys_and_makes_tables(home: Path) -> None:
    result = loaded(home, GOOD, 'route."gpt-4o".services=["chat"]', "gateway.drain_timeout=1s")

    assert result.profile.route["gpt-4o"].services == ("chat",)
    assert result.profile.gateway.drain_timeout_s == 1.0


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("service.chat.port=x", "service.chat.port", "expected an integer"),
        ("service.chat.prot=1", "service.chat.prot", 'did you mean "port"'),
        ("mode", "", "expected KEY=VALUE"),
        ("=1", "", "expected a dotted key"),
        ("a b=1", "", "expected a dotted key"),
        ("#=1", "", "expected a dotted key"),
        ("service.chat.port.x=1", "", "service.chat.port is not a table"),
        ("mode=1\nactive='x'", "mode", 'expected "dual" or "single"'),
        ("service.chat.env.A=\udcff", "service.chat.env.A", "not valid UTF-8"),
    ],
)
def test_a_bad_override_is_blamed_on_the_flag(
    home: Path, override: str, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(home, GOOD, override)

    [problem] = raised.value.problems
    assert problem.file.startswith("--set")
    assert problem.key == key
    assert words in problem.message


def test_a_command_s_directory_is_absolute_and_must_exist(home: Path) -> None:
    text = GOOD.replace("port = 8002", 'port = 8002\ncwd = "models"')
    service = loaded(home, text).profile.service["rag"]

    assert isinstance(service, Command)
    assert service.cwd == str(home / "models")
    found = problems(home, text.replace('cwd = "models"', 'cwd = "absent"'))
    assert found == {"service.rag.cwd": f"{home}/absent is not a directory"}


PATHS = """
env_file = "{}x.env"
[models]
dirs = ["{}models"]
[gateway]
api_keys_file = "{}keys"
envoy = "{}envoy"
[service.chat]
kind = "llama-server"
model = "{}models/chat.gguf"
binary = "{}server"
[service.store]
kind = "qdrant"
storage = "{}storage"
binary = "{}qdrant"
[service.rag]
kind = "command"
command = ["{}rag", "{}rag"]
cwd = "{}models"
"""


def paths_of(profile: Loaded) -> list[str | None]:
    chat_server, store, rag = profile.profile.service.values()
    assert isinstance(chat_server, LlamaServer)
    assert isinstance(store, Qdrant)
    assert isinstance(rag, Command)
    gateway = profile.profile.gateway
    programs = [gateway.envoy, chat_server.binary, store.binary, rag.command[0]]
    files = [*profile.profile.models.dirs, gateway.api_keys_file, chat_server.model, rag.cwd]
    assert rag.command[1].endswith("/rag")
    return [*programs, *files, store.storage]


@pytest.fixture
def keys(home: Path) -> Path:
    for name in ("keys", "x.env"):
        (home / name).write_text("A=1")
        (home / name).chmod(0o600)
    return home


def test_a_tilde_is_the_home_directory_at_every_path(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(keys))
    (keys / "elsewhere").mkdir()
    path = keys / "elsewhere" / "p.toml"
    path.write_text(PATHS.replace("{}", "~/"))

    found = paths_of(load(path, environ={}, config_dir=keys))

    names = "envoy server qdrant rag models keys models/chat.gguf models storage"
    assert found == [str(keys / name) for name in names.split()]


def test_a_relative_path_is_below_the_profile_and_storage_below_the_state(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")

    found = paths_of(loaded(keys, PATHS.replace('"{}models/chat', '"chat').replace("{}", "./")))

    names = "envoy server qdrant rag models keys models/chat.gguf models"
    assert found == [*(str(keys / name) for name in names.split()), "./storage"]


def test_the_home_of_nobody_is_a_problem_at_every_path(home: Path) -> None:
    found = problems(home, PATHS.replace("{}", "~no-such-user/"))

    assert set(found) == {
        "env_file",
        "models.dirs[0]",
        "gateway.api_keys_file",
        "gateway.envoy",
        "service.chat.model",
        "service.chat.binary",
        "service.store.storage",
        "service.store.binary",
        "service.rag.command[0]",
        "service.rag.cwd",
    }
    assert all("there is no such home directory" in message for message in found.values())


def test_a_command_without_a_directory_runs_beside_the_profile(home: Path) -> None:
    service = loaded(home, GOOD).profile.service["rag"]

    assert isinstance(service, Command)
    assert (service.command, service.cwd) == (("rag",), str(home))


def test_binary_is_a_key_of_the_kinds_that_use_it(home: Path) -> None:
    found = problems(home, GOOD.replace('command = ["rag"]', 'command = ["rag"]\nbinary = "x"'))

    assert list(found) == ["service.rag.binary"]
    assert "unknown key" in found["service.rag.binary"]


def test_no_problem_shows_the_value_of_a_variable(home: Path) -> None:
    text = """
env_file = "${X}"
mode = "${X}"
[models]
dirs = ["${X}"]
[gateway]
listen = "${X}"
api_keys_file = "${X}"
[service.chat]
kind = "llama-server"
model = "${X}"
gpu_layers = "${X}"
depends_on = ["${X}"]
grace_period = "${X}"
[service.rag]
kind = "command"
command = ["${X}"]
cwd = "${X}"
port = "${X}"
[service.other]
kind = "${X}"
[route.chat]
services = ["${X}"]
aliases = ["${X}", "${X}"]
"""

    found = problems(home, text, X="s3cret")

    assert len(found) == 13
    assert not [message for message in found.values() if "s3cret" in message]
    assert all("the value of ${X}" in message for message in found.values())


def test_a_default_is_no_secret(home: Path) -> None:
    found = problems(home, GOOD.replace('"chat.gguf"', '"${M:-none.gguf}"'), M="")

    assert 'no file "none.gguf"' in found["service.chat.model"]


def test_what_is_loaded_has_plain_strings(home: Path) -> None:
    text = GOOD.replace('"rag"', '"${X}"').replace('"chat.gguf"', '"${M}"')
    profile = loaded(home, text, 'service.rag.env.A="${X}"', X="x", M="chat.gguf").profile

    assert json.loads(msgspec.json.encode(profile))["service"]["rag"]["env"] == {"A": "x"}


def test_a_missing_model_says_what_to_do(home: Path) -> None:
    path = home / "p.toml"
    path.write_text(GOOD.replace("chat.gguf", "none.gguf"))
    with pytest.raises(ConfigError) as raised:
        load(path, environ={}, config_dir=home)

    assert raised.value.hint == (
        "put the file into one of models.dirs, or set service.chat.model; "
        "llmsup start demo needs no GPU"
    )
    path.write_text(GOOD.replace("chat.gguf", "none.gguf").replace('"mod', '"package:a_b", "mod'))
    with pytest.raises(ConfigError) as raised:
        load(path, environ={}, config_dir=home)

    assert raised.value.hint == "run make demo in a checkout; pip install --no-deps a-b"


def test_a_profile_that_lacks_only_models_can_be_looked_at(home: Path) -> None:
    path = home / "p.toml"
    path.write_text(GOOD.replace("chat.gguf", "none.gguf"))

    profile, missing = look(path, environ={}, config_dir=home)

    assert chat(profile).model == "none.gguf"
    assert missing is not None
    assert [problem.key for problem in missing.problems] == ["service.chat.model"]
    with pytest.raises(ConfigError) as raised:
        look(path, environ={}, overrides=["mode=x"], config_dir=home)
    assert len(raised.value.problems) == 2


def test_the_gateway_s_keys_are_read_from_beside_the_profile(home: Path) -> None:
    text = GOOD + '[gateway]\nlisten = "0.0.0.0:8000"\napi_keys_file = "keys.txt"\n'
    keys = home / "keys.txt"

    assert "No such file" in problems(home, text)["gateway.api_keys_file"]
    keys.write_text("alpha\n")
    keys.chmod(0o644)
    assert "chmod 600" in problems(home, text)["gateway.api_keys_file"]
    keys.chmod(0o600)
    result = loaded(home, text)
    assert result.api_keys == ("alpha",)
    assert result.profile.gateway.api_keys_file == str(keys)
    assert "alpha" not in repr(result)


def test_limits_of_logs_carry_units(home: Path) -> None:
    limits = loaded(home, GOOD + '[logs]\nmax_size = "1.5MiB"\nkeep = 0\n').profile.logs
    assert (limits.max_size_bytes, limits.keep) == (3 * 2**19, 0)
    defaults = loaded(home, GOOD).profile.logs
    assert (defaults.max_size_bytes, defaults.keep) == (10 * 2**20, 3)


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("max_size = 10", "logs.max_size", "a size of 64KiB to 1TiB with a unit"),
        ('max_size = "10MB"', "logs.max_size", "expected a size with a unit"),
        ('max_size = "1KiB"', "logs.max_size", "a size of 64KiB to 1TiB with a unit"),
        ("keep = -1", "logs.keep", "-1"),
        ("kep = 1", "logs.kep", 'did you mean "keep"'),
    ],
)
def test_limits_of_logs_that_make_no_sense_are_refused(
    home: Path, line: str, key: str, words: str
) -> None:
    assert words in problems(home, f"{GOOD}[logs]\n{line}\n")[key]


@pytest.mark.parametrize(
    "origin", ["chat.example.com", "https://chat.example.com/", "https://a b", "*", "app://x", ""]
)
def test_what_is_no_origin_of_a_page_is_refused(home: Path, origin: str) -> None:
    text = f'{GOOD}[gateway]\nallowed_origins = ["null", "http://[::1]:3000", "{origin}"]\n'
    assert "the origin of a web page" in problems(home, text)["gateway.allowed_origins[2]"]
