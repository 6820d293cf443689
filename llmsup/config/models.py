"""Where the model files are: directories, installed packages, or beside the profile."""

import importlib.util
import os
import re
import stat
from pathlib import Path

from llmsup.config.files import exists, kind, located
from llmsup.config.wording import named, quoted

PACKAGE = "package:"
MAGIC = b"GGUF"
"""What a model file starts with."""

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>[0-9]{5})-of-(?P<total>[0-9]{5})\.gguf", re.DOTALL)


def absent_packages(dirs: tuple[str, ...]) -> tuple[str, ...]:
    """The packages of `dirs`, after loading, that are not installed."""
    return tuple(entry.removeprefix(PACKAGE) for entry in dirs if entry.startswith(PACKAGE))


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


def find_model(model: str, dirs: tuple[str, ...], base: Path) -> Path:
    """The file of `model`: as given, in the absolute `dirs` in order, or in `base`.

    Raises ValueError saying where it was looked for, or what is wrong with the file.
    """
    if model.startswith(("/", "~")):
        path = located(model, base)
        name = named(model) if named(model) != model else str(path)
        if not exists(path):
            raise ValueError(f"no such file: {name}")
        return _whole(path, name)
    places = {Path(entry): named(entry) for entry in dirs if not entry.startswith(PACKAGE)}
    places.setdefault(base, str(base))
    for directory, name in places.items():
        if exists(directory / model):
            return _whole(directory / model, f"{name}/{named(model)}")
    words = f"no file {quoted(model)} in {', '.join(places.values())}"
    if absent := absent_packages(dirs):
        words += f" (package not installed: {', '.join(absent)})"
    raise ValueError(words)


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files of the model that `path` is a part of, by its name; most models are one file."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return (path,)
    part, total = int(split["part"]), int(split["total"])
    if not 1 <= part <= total:
        return (path,)
    return tuple(
        path.with_name(f"{split['stem']}-{number:05}-of-{total:05}.gguf")
        for number in range(1, total + 1)
    )


def size_bytes(path: Path) -> int:
    """Of all files of a model; 0 where they have gone."""
    try:
        return sum(part.stat().st_size for part in parts_of(path))
    except OSError:
        return 0


def _whole(path: Path, name: str) -> Path:
    """`path`, a model file with all its parts beside it; problems call it `name`."""
    _require_gguf(path, name)
    parts = parts_of(path)
    if parts[0] != path:
        number = parts.index(path) + 1
        raise ValueError(f"{name} is part {number} of {len(parts)}; name the first part")
    others = dict(enumerate(parts[1:], start=2))
    if missing := [number for number, part in others.items() if not exists(part)]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"{name} has {len(parts)} parts; beside it part {missing[0]}{more} is missing"
        )
    for number, part in others.items():
        _require_gguf(part, f"part {number} of {name}")
    return path


def _require_gguf(path: Path, name: str) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{name} is {kind(path)}, not a model file")
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {os.strerror(error.errno or 0)}") from None
    if start != MAGIC:
        raise ValueError(
            f"{name} is not a GGUF file: it starts with {start!r}" if start else f"{name} is empty"
        )
