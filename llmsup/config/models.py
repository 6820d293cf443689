"""Where the model files are: directories, installed packages, or beside the profile."""

import importlib.util
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from llmsup.config.files import exists, kind, located
from llmsup.config.wording import quoted

PACKAGE = "package:"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class SearchPath:
    """The directories of `models.dirs`, and the packages named there that are not installed."""

    directories: tuple[Path, ...]
    absent_packages: tuple[str, ...] = ()


def search_path(dirs: tuple[str, ...], base: Path) -> SearchPath:
    """Where `dirs` lead, in order; relative ones stand below `base`."""
    directories: list[Path] = []
    absent: list[str] = []
    for entry in dirs:
        if not entry.startswith(PACKAGE):
            directories.append(located(entry, base))
            continue
        package = entry.removeprefix(PACKAGE)
        found = package_directories(package)
        directories.extend(found)
        if not found:
            absent.append(package)
    return SearchPath(tuple(directories), tuple(absent))


def package_directories(package: str) -> tuple[Path, ...]:
    """The directories of an installed top-level package, found without importing it."""
    if not package.isidentifier():
        return ()
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ()
    places = None if spec is None else spec.submodule_search_locations
    return tuple(Path(place) for place in places or ())


def find_model(model: str, search: SearchPath, base: Path) -> Path:
    """The file of `model`: as given, in the directories in order, or below `base`.

    Raises ValueError saying where it was looked for, or what is wrong with the file.
    """
    if model.startswith(("/", "~/")):
        path = located(model, base)
        if not exists(path):
            raise ValueError(f"no such file: {path}")
        return _gguf(path)
    directories = (*search.directories, base)
    for directory in directories:
        if exists(directory / model):
            return _gguf(directory / model)
    where = ", ".join(dict.fromkeys(map(str, directories)))
    words = f"no file {quoted(model)} in {where}"
    if search.absent_packages:
        words += f" (package not installed: {', '.join(search.absent_packages)})"
    raise ValueError(words)


def _gguf(path: Path) -> Path:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is {kind(path)}, not a model file")
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from None
    if start != _MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it starts with {start!r}" if start else f"{path} is empty"
        )
    return path
