"""A decoded profile to one whose paths are absolute and whose files have been looked at."""

import stat
from pathlib import Path

from msgspec.structs import replace

from llmsup.config.decode import Report
from llmsup.config.files import is_directory, located, read_text
from llmsup.config.models import PACKAGE, SearchPath, find_model, package_directories, search_path
from llmsup.config.schema import Command, Gateway, LlamaServer, Profile, Service

_COMMENT = "#"


def resolve(profile: Profile, base: Path, report: Report) -> Profile:
    """`profile` with every path absolute; relative ones stand below `base`.

    Model files, working directories and what a model package holds are looked for; what is missing
    goes to `report`.
    """
    search = search_path(profile.models.dirs, base)
    services = {
        name: _service(name, service, search, base, report)
        for name, service in profile.service.items()
    }
    return replace(
        profile,
        models=replace(profile.models, dirs=_directories(profile.models.dirs, base)),
        gateway=_gateway(profile.gateway, base),
        service=services,
    )


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file that only its owner can read: one a line, blank and `#` lines apart.

    Raises ValueError with what is wrong with the file; never with a key in it.
    """
    text = read_text(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"others can read it (mode {mode:04o}); chmod 600 {path}")
    keys: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith(_COMMENT):
            continue
        if not all("!" <= character <= "~" for character in key):
            raise ValueError(f"line {number}: a key is visible ASCII without spaces")
        keys.append(key)
    if not keys:
        raise ValueError("no keys in it; write one a line")
    return tuple(dict.fromkeys(keys))


def _directories(dirs: tuple[str, ...], base: Path) -> tuple[str, ...]:
    """`dirs` made absolute; packages that are not installed stay as they are written."""
    directories: list[str] = []
    for entry in dirs:
        if entry.startswith(PACKAGE):
            places = package_directories(entry.removeprefix(PACKAGE))
            directories.extend(map(str, places) if places else [entry])
        else:
            directories.append(str(located(entry, base)))
    return tuple(directories)


def _gateway(gateway: Gateway, base: Path) -> Gateway:
    keys = gateway.api_keys_file
    return replace(
        gateway,
        api_keys_file=None if keys is None else str(located(keys, base)),
        envoy=_binary(gateway.envoy, base),
    )


def _service(
    name: str, service: Service, search: SearchPath, base: Path, report: Report
) -> Service:
    service = replace(service, binary=_binary(service.binary, base))
    match service:
        case LlamaServer():
            try:
                return replace(service, model=str(find_model(service.model, search, base)))
            except ValueError as error:
                report(("service", name, "model"), str(error))
        case Command(cwd=str(cwd)):
            directory = located(cwd, base)
            if not is_directory(directory):
                report(("service", name, "cwd"), f"{directory} is not a directory")
            return replace(service, cwd=str(directory))
    return service


def _binary(binary: str | None, base: Path) -> str | None:
    """A program with a slash is a path; a bare name is looked up on PATH when it is started."""
    return str(located(binary, base)) if binary and "/" in binary else binary
