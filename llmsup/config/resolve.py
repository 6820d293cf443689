"""A decoded profile to one whose paths are absolute and whose files have been looked at."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from llmsup.config.decode import Report
from llmsup.config.files import is_directory, located, read_text
from llmsup.config.interpolated import made_of
from llmsup.config.models import PACKAGE, find_model, package_directories
from llmsup.config.schema import Command, Gateway, LlamaServer, Profile, Qdrant, Service
from llmsup.config.wording import named

_COMMENT = "#"


def resolve(profile: Profile, base: Path, report: Report, report_model: Report) -> Profile:
    """`profile` with every path absolute; relative ones stand below `base`.

    Working directories and model files are looked for. What is wrong goes to `report`, or, with a
    model file, to `report_model`.
    """
    paths = _Paths(base, report)
    dirs = tuple(_directories(profile.models.dirs, paths))
    services: dict[str, Service] = {}
    for name, service in profile.service.items():
        services[name] = _service(name, service, paths)
        if isinstance(service, LlamaServer):
            try:
                model = str(find_model(service.model, dirs, base))
            except ValueError as error:
                report_model(("service", name, "model"), str(error))
            else:
                services[name] = replace(services[name], model=model)
    return replace(
        profile,
        models=replace(profile.models, dirs=dirs),
        gateway=_gateway(profile.gateway, paths),
        service=services,
    )


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file that only its owner can read: one a line, blank and `#` lines apart.

    Raises ValueError with what is wrong with the file; never with a key in it.
    """
    text = read_text(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"others can read it (mode {mode:04o}); chmod 600 that file")
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


@dataclass(frozen=True)
class _Paths:
    """Makes the paths of a profile absolute, all in the same way; relative ones are below `base`.

    One that names no place goes to `report`, and stays as it is.
    """

    base: Path
    report: Report

    def absolute(self, text: str, *key: str | int) -> str:
        """The path that stands at `key`."""
        try:
            return made_of(str(located(text, self.base)), text)
        except ValueError as error:
            self.report(key, str(error))
            return text

    def program(self, text: str, *key: str | int) -> str:
        """A program with a slash is a path; a bare name is looked up on PATH when it is started."""
        return self.absolute(text, *key) if "/" in text or text.startswith("~") else text


def _directories(dirs: tuple[str, ...], paths: _Paths) -> Iterator[str]:
    """`dirs` made absolute; packages that are not installed stay as they are written."""
    for position, entry in enumerate(dirs):
        if entry.startswith(PACKAGE):
            places = package_directories(entry.removeprefix(PACKAGE))
            yield from map(str, places or (entry,))
        else:
            yield paths.absolute(entry, "models", "dirs", position)


def _gateway(gateway: Gateway, paths: _Paths) -> Gateway:
    keys, admin_keys, envoy = gateway.api_keys_file, gateway.admin_keys_file, gateway.envoy
    return replace(
        gateway,
        api_keys_file=keys and paths.absolute(keys, "gateway", "api_keys_file"),
        admin_keys_file=admin_keys and paths.absolute(admin_keys, "gateway", "admin_keys_file"),
        envoy=envoy and paths.program(envoy, "gateway", "envoy"),
    )


def _service(name: str, service: Service, paths: _Paths) -> Service:
    key = ("service", name)
    if isinstance(service, Command):
        return _command(service, paths, *key)
    binary = service.binary and paths.program(service.binary, *key, "binary")
    if isinstance(service, Qdrant) and service.storage.startswith("~"):
        return replace(
            service, binary=binary, storage=paths.absolute(service.storage, *key, "storage")
        )
    return replace(service, binary=binary)


def _command(service: Command, paths: _Paths, *key: str) -> Command:
    program = service.command[:1]
    directory = paths.absolute(service.cwd or ".", *key, "cwd")
    if not is_directory(Path(directory)):
        paths.report((*key, "cwd"), f"{named(directory)} is not a directory")
    return replace(
        service,
        command=(
            *(paths.program(word, *key, "command", 0) for word in program),
            *service.command[1:],
        ),
        cwd=directory,
    )
