"""A profile on disk to a Profile, or a ConfigError with everything that is wrong with it.

Precedence: flag (`--set`) > environment > env file > profile > default. The environment and the
env file speak only through `${VAR}`.
"""

import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsup.config.decode import decode
from llmsup.config.files import exists, located, read_text
from llmsup.config.interpolate import filled_in, interpolate
from llmsup.config.overrides import apply_override, parse_override
from llmsup.config.profiles import find
from llmsup.config.resolve import read_api_keys, resolve
from llmsup.config.rules import findings
from llmsup.config.schema import Profile
from llmsup.config.wording import Key, dotted, one_line, quoted
from llmsup.errors import ConfigError, Problem

ENV_FILE = ".env"
SET = "--set"


@dataclass(frozen=True)
class Loaded:
    """A profile without problems, its name, its file, the gateway's keys, and what --set said."""

    profile: Profile
    name: str
    path: Path
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    overrides: tuple[str, ...] = ()


class _Problems:
    """Collects problems: the first at each key, under the file or the flag that it came from."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flags: list[Key] = []
        self._found: dict[tuple[str, Key], Problem] = {}

    def report(self, key: Key, message: str) -> None:
        by_flag = any(key[: len(flag)] == flag for flag in self._flags)
        self.add(SET if by_flag else str(self._path), key, message)

    def add(self, file: str, key: Key, message: str) -> None:
        problem = Problem(one_line(file), dotted(key), one_line(message))
        self._found.setdefault((file, key), problem)

    def note_flag(self, key: Key) -> None:
        self._flags.append(key)

    def raise_any(self) -> None:
        if self._found:
            raise ConfigError(list(self._found.values()))


def load(
    source: str | Path,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    config_dir: Path,
) -> Loaded:
    """The profile `source`, a name or a path, with everything filled in and looked up.

    Raises ConfigError with all problems.
    """
    path = find(source, config_dir)
    problems = _Problems(path)
    raw = _table(path)
    _override(raw, overrides, problems)
    variables = _variables(raw, path, environ, problems)
    try:
        raw = interpolate(raw, variables, (), problems.report)
    except RecursionError:
        raise ConfigError(
            [Problem(one_line(str(path)), "", "tables are nested too deeply")]
        ) from None
    profile: Profile = decode(raw, Profile, (), problems.report)
    services = raw.get("service")
    declared = frozenset(services if isinstance(services, dict) else ())
    for key, message in findings(profile, declared):
        problems.report(key, message)
    profile = resolve(profile, path.parent, problems.report)
    api_keys = _api_keys(profile, problems)
    problems.raise_any()
    return Loaded(profile, path.stem, path, api_keys, tuple(overrides))


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        message = f"not valid TOML: {error}"
    except RecursionError:
        message = "arrays or tables are nested too deeply"
    except ValueError as error:
        message = str(error)
    raise ConfigError([Problem(one_line(str(path)), "", message)]) from None


def _override(raw: dict[str, Any], overrides: Sequence[str], problems: _Problems) -> None:
    for text in overrides:
        try:
            key, value = parse_override(text)
            apply_override(raw, key, value)
        except ValueError as error:
            problems.add(f"{SET} {quoted(text)}", (), str(error))
        else:
            problems.note_flag(key)


def _variables(
    raw: dict[str, Any], path: Path, environ: Mapping[str, str], problems: _Problems
) -> Mapping[str, str]:
    """The environment over the env file: `env_file` of the profile, else `.env` beside it."""
    written = raw.get("env_file")
    if written is None:
        file = path.parent / ENV_FILE
        if not (exists(file) and file.is_file()):
            return environ
    elif not isinstance(written, str):
        return environ  # the decoder reports it
    else:
        try:
            file = located(filled_in(written, environ), path.parent)
        except ValueError:
            return environ  # interpolation reports it
        if not exists(file):
            problems.report(("env_file",), f"no such file: {file}")
            return environ
    return {**_env_file(file, problems), **environ}


def _env_file(file: Path, problems: _Problems) -> dict[str, str]:
    from dotenv.parser import parse_stream  # noqa: PLC0415 - few profiles have one

    values: dict[str, str] = {}
    try:
        text = read_text(file)
    except ValueError as error:
        problems.add(str(file), (), str(error))
        return values
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            # The text of the line stays out: it may be half of a secret.
            file_line = f"{file} line {binding.original.line}"
            problems.add(file_line, (), "expected NAME=value")
        elif binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value
    return values


def _api_keys(profile: Profile, problems: _Problems) -> tuple[str, ...]:
    if profile.gateway.api_keys_file is None:
        return ()
    try:
        return read_api_keys(Path(profile.gateway.api_keys_file))
    except ValueError as error:
        message = f"{profile.gateway.api_keys_file}: {error}"
        problems.report(("gateway", "api_keys_file"), message)
        return ()
