"""What a person wrote into a profile."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st

from llmsup.config.load import load
from llmsup.core.routing import effective_routes
from llmsup.errors import ConfigError
from llmsup.units import wanted
from tests.fuzz.harness import fuzz, mutated, replaced
from tests.home import REPOSITORY

GOOD: dict[str, Any] = {
    "mode": "dual",
    "models": {"dirs": ["models", "package:nothing_here"]},
    "gpu": {"device": "GPU-1", "ceiling": "95%", "headroom": "256MiB", "rebalance": "auto"},
    "gateway": {"listen": "127.0.0.1:8000", "drain_timeout": "3s"},
    "service": {
        "chat": {
            "kind": "llama-server", "model": "chat.gguf", "port": 8001, "gpu_layers": "all",
            "ctx_size": 4096, "args": ["--threads", "1"], "env": {"A": "${LANG:-b}"},
            "readiness": {"http_get": "/health", "period": "2s", "failure_threshold": 3},
            "restart": {"policy": "always", "backoff": "1s", "max_deaths": 5, "window": "10m"},
        },
        "code": {
            "kind": "llama-server", "model": "chat.gguf", "gpu_layers": "auto", "ctx_size": 4096,
            "degrade": ["cache_type", "ubatch", "ctx_size"], "ctx_size_min": 1024,
        },
        "qdrant": {"kind": "qdrant", "port": 6333, "storage": "qdrant"},
        "rag": {"kind": "command", "command": ["rag", "${ONE}"], "depends_on": ["chat"]},
    },
    "route": {"chat-7b": {"services": ["chat"], "aliases": ["gpt-4o-mini"]}},
}  # fmt: skip
NAMES = ("service", "route", "kind", "port", "chat", "args", "env", "depends_on", "x\ny", "")
TOKENS = (
    b"[service.x]\n", b"[[route]]\n", b'"""', b"'''", b"= {", b"[" * 2000, b"a." * 2000,
    b"${", b"${A:-${B}}", b"$$", b"\xff", b"\x00", b"\r", b"\xef\xbb\xbf", b"= 1979-05-27\n",
    b"= inf\n", b"= 0x7fffffffffffffff\n", b"= 1e400\n", b"9" * 5000, b'"-1s"', b'"1h" * 2', b"~",
    b'"~nobody/x"', b'"../../../etc/passwd"', b"\\u0000", b"env_file = 'p.toml'\n", b"\xe2\x80\xae",
    b"= '101%'\n", b"= '1e9%'\n",
)  # fmt: skip


def toml(value: object) -> str:
    """A value as TOML; what TOML does not have becomes something near."""
    if value is None:
        return '""'
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(str(key))} = {toml(item)}" for key, item in value.items())
        return "{ " + inner + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def text_of(profile: object) -> str:
    if not isinstance(profile, dict):
        return toml(profile)
    return "\n".join(f"{json.dumps(str(key))} = {toml(item)}" for key, item in profile.items())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profiles")
    (directory / "models").mkdir()
    (directory / "models" / "chat.gguf").write_bytes(b"GGUF")
    return directory


def try_to_load(home: Path, content: bytes) -> None:
    """A profile that can be worked with, or a list of problems, each a line."""
    path = home / "p.toml"
    path.write_bytes(content)
    try:
        loaded = load(path, environ={"ONE": "1", "A": "x"}, config_dir=home)
    except ConfigError as error:
        problems = [str(problem) for problem in error.problems]
    else:
        assert set(wanted(loaded.profile)) <= {*loaded.profile.service, "gateway"}
        effective_routes(loaded.profile)
        return
    assert problems
    for problem in problems:
        assert len(problem.splitlines()) == 1
        assert len(problem) < 10_000


SERVICE = b"[service.chat]\nkind = 'llama-server'\nmodel = 'none.gguf'\n"
SEEDS = [
    text_of(GOOD).encode(),
    *(path.read_bytes() for path in sorted((REPOSITORY / "profiles").glob("*.toml"))),
]


@example(content=b'[models]\ndirs = ["~/' + b"x" * 90_000 + b'"]\n' + SERVICE)
@example(content=b'[models]\ndirs = ["' + b"/a" * 90_000 + b'"]\n' + SERVICE)
@fuzz("profile text", content=st.one_of(mutated(SEEDS, TOKENS), st.binary(max_size=200)))
def test_any_text_is_a_profile_or_a_list_of_problems(home: Path, content: bytes) -> None:
    try_to_load(home, content)


@fuzz("profile values", profile=replaced(GOOD, NAMES))
def test_any_values_are_a_profile_or_a_list_of_problems(home: Path, profile: object) -> None:
    try_to_load(home, text_of(profile).encode(errors="surrogatepass"))


def test_what_is_mutated_is_good(home: Path) -> None:
    (home / "p.toml").write_bytes(SEEDS[0])
    load(home / "p.toml", environ={"ONE": "1"}, config_dir=home)
