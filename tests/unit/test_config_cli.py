import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmsup.cli.profile import app
from llmsup.errors import ConfigError

PROFILE = """# one command
[service.rag]
kind = "command"
command = ["rag"]
env = { API_KEY = "s3cret" }
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMSUP_HOME", str(tmp_path))
    monkeypatch.delenv("LLMSUP_PROFILE", raising=False)
    path = tmp_path / "config" / "profiles" / "mine.toml"
    path.parent.mkdir(parents=True)
    path.write_text(PROFILE)
    return path


def output(*args: str) -> str:
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr == ""
    return result.stdout


def test_list_shows_name_origin_and_summary_in_columns() -> None:
    lines = output("list").splitlines()

    assert "mine    yours    one command" in lines
    assert any(line.startswith("dual    shipped  ") for line in lines)


def test_list_json_has_the_paths(mine: Path) -> None:
    rows = {row["name"]: row for row in json.loads(output("list", "--json"))}

    assert rows["mine"] == {
        "name": "mine",
        "origin": "yours",
        "summary": "one command",
        "path": str(mine),
    }


def test_validate_counts_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output("validate", "mine") == "mine: ok (1 service, 0 routes)\n"
    monkeypatch.setenv("LLMSUP_PROFILE", "mine")
    assert output("validate") == "mine: ok (1 service, 0 routes)\n"


def test_validate_raises_every_problem(mine: Path) -> None:
    mine.write_text('mode = "x"\n')

    with pytest.raises(ConfigError) as raised:
        output("validate", "mine", "--set", "gateway.listen=1")

    assert [problem.key for problem in raised.value.problems] == [
        "mode",
        "service",
        "gateway.listen",
    ]


def test_show_prints_what_is_in_effect_without_secrets(mine: Path) -> None:
    text = output("show", "mine", "--set", "service.rag.restart.backoff=2s")

    assert text.startswith(f"# mine: {mine}\n")
    assert 'listen = "127.0.0.1:8000"' in text
    assert 'backoff = "2s"' in text
    assert "s3cret" not in text


def test_show_prints_a_profile_whose_models_are_missing(mine: Path) -> None:
    mine.write_text('[service.a]\nkind = "llama-server"\nmodel = "none.gguf"\n')

    result = CliRunner().invoke(app, ["show", "mine"], catch_exceptions=False)

    assert result.exit_code == 0
    assert 'model = "none.gguf"' in result.stdout
    assert tomllib.loads(result.stdout)["service"]["a"]["kind"] == "llama-server"
    [line, hint] = result.stderr.splitlines()
    assert line.startswith(f'missing: {mine}: service.a.model: no file "none.gguf" in ')
    assert hint.startswith("hint: put the file into one of models.dirs")


def test_show_json_is_the_same_document() -> None:
    table = json.loads(output("show", "mine", "--json"))

    assert table["service"]["rag"]["kind"] == "command"
    assert table["service"]["rag"]["env"] == {"API_KEY": "***"}


def test_path_prints_the_file(mine: Path) -> None:
    assert output("path", "mine") == f"{mine}\n"
