"""Which profiles there are: the user's own, then those that come with llmsup."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmsup.config.files import exists, located, read_text
from llmsup.config.wording import one_line, quoted, suggestion
from llmsup.errors import ConfigError, Problem

SUFFIX = ".toml"
DEFAULT = "dual"
_LISTED = "llmsup profile list shows what there is"


@dataclass(frozen=True)
class Available:
    """A profile that can be named. `summary` is the comment on the first line of its file."""

    name: str
    origin: Literal["yours", "shipped"]
    summary: str
    path: Path


def default_name(environ: Mapping[str, str]) -> str:
    """The profile that is meant where none is named: `LLMSUP_PROFILE`, else "dual"."""
    return environ.get("LLMSUP_PROFILE") or DEFAULT


def available(config_dir: Path) -> list[Available]:
    """Every profile by name; the user's own hide shipped ones of the same name."""
    found: dict[str, Available] = {}
    places: tuple[tuple[Literal["yours", "shipped"], Path], ...] = (
        ("yours", config_dir / "profiles"),
        ("shipped", shipped_directory()),
    )
    for origin, directory in places:
        for path in _profiles_in(directory):
            found.setdefault(path.stem, Available(path.stem, origin, _summary(path), path))
    return sorted(found.values(), key=lambda profile: profile.name)


def find(name_or_path: str | Path, config_dir: Path) -> Path:
    """The absolute path of a profile: a path has a slash or ends in .toml, the rest are names.

    Raises ConfigError naming the known profiles.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(SUFFIX):
        try:
            path = located(text, Path.cwd())
        except ValueError as error:
            raise ConfigError([Problem("profile", "", str(error))], hint=_LISTED) from None
        if not exists(path):
            raise ConfigError([Problem(one_line(text), "", "no such file")], hint=_LISTED)
        return path
    for directory in (config_dir / "profiles", shipped_directory()):
        path = directory / f"{text}{SUFFIX}"
        if exists(path):
            return path.absolute()
    known = [profile.name for profile in available(config_dir)]
    raise ConfigError(
        [Problem(f"profile {quoted(text)}", "", f"no such profile; {suggestion(text, known)}")],
        hint=_LISTED if known else "give the path of a TOML file",
    )


def shipped_directory() -> Path:
    """Package data in a wheel; beside the package in an editable install."""
    package = Path(__file__).parents[1]
    packaged = package / "profiles"
    return packaged if packaged.is_dir() else package.parent / "profiles"


def _profiles_in(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == SUFFIX)
    except OSError:
        return []


def _summary(path: Path) -> str:
    try:
        line = read_text(path).partition("\n")[0].strip()
    except ValueError:
        return ""
    return line.lstrip("# ") if line.startswith("#") else ""
