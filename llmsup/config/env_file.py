"""Where `${VAR}` looks: the environment over an env file."""

import io
from collections.abc import Mapping
from pathlib import Path

from llmsup.config.files import exists, located, read_text
from llmsup.config.interpolate import filled_in
from llmsup.config.interpolated import made_of
from llmsup.config.problems import Problems
from llmsup.config.profiles import shipped_directory
from llmsup.config.wording import named

ENV_FILE = ".env"


def variables(
    written: object, path: Path, environ: Mapping[str, str], config_dir: Path, problems: Problems
) -> Mapping[str, str]:
    """The environment over the env file of the profile `path`, whose `env_file` says `written`.

    None: `.env` beside it; for a profile that comes with llmsup, in `config_dir`.
    """
    if written is None:
        directory = config_dir if path.parent == shipped_directory() else path.parent
        file = directory / ENV_FILE
        if exists(file) and file.is_file():
            return {**_values(file, str(file), problems), **environ}
    elif isinstance(written, str):  # else the decoder reports it
        return {**_named(written, path.parent, environ, problems), **environ}
    return environ


def _named(
    written: str, base: Path, environ: Mapping[str, str], problems: Problems
) -> dict[str, str]:
    """The values of the env file that a profile names."""
    try:
        text = filled_in(written, environ)
    except ValueError:
        return {}  # interpolation reports it
    try:
        file = located(text, base)
    except ValueError as error:
        problems.report(("env_file",), str(error))
        return {}
    name = named(made_of(str(file), text))
    if not exists(file):
        problems.report(("env_file",), f"no such file: {name}")
        return {}
    return _values(file, name, problems)


def _values(file: Path, name: str, problems: Problems) -> dict[str, str]:
    from dotenv.parser import parse_stream  # noqa: PLC0415 - few profiles have one

    values: dict[str, str] = {}
    try:
        text = read_text(file)
    except ValueError as error:
        problems.add(name, (), str(error))
        return values
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            # The text of the line stays out: it may be half of a secret.
            problems.add(f"{name} line {binding.original.line}", (), "expected NAME=value")
        elif binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value
    return values
