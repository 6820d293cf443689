"""Cards that do not exist: tests/stubs/nvml.c tells of them, from a file that tests rewrite."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.home import STUBS

MIB = 2**20
NAME = "NVIDIA GeForce RTX 4050 Laptop GPU"


class StubCards:
    """The library in a directory of its own; `environ` makes a program load it."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler (cc)")
        library = directory / "libnvidia-ml.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, STUBS / "nvml.c"], check=True)
        self._state = directory / "cards"
        self._calls = directory / "calls"
        self.environ = {
            "LD_LIBRARY_PATH": str(directory),
            "NVML_STUB": str(self._state),
            "NVML_STUB_CALLS": str(self._calls),
        }

    @staticmethod
    def card(
        uuid: str = "GPU-1",
        *,
        total: int = 6141 * MIB,
        free: int = 3277 * MIB,
        used: int = 2735 * MIB,
        utilization: int = 7,
        name: str = NAME,
    ) -> str:
        """A line for `write`; sizes in bytes, utilization -1 where it is not supported."""
        return f"card {uuid} {total} {free} {used} {utilization} {name}"

    def write(self, *lines: str) -> None:
        """What the driver says from now on: `card(…)`, and lines as nvml.c has them."""
        fresh = self._state.with_suffix(".new")
        text = "\n".join(["driver 560.35.03", *lines, ""])
        fresh.write_bytes(text.encode(errors="surrogateescape"))
        fresh.replace(self._state)

    def unload(self) -> None:
        """The driver is not loaded any more."""
        self._state.unlink()

    def calls(self, function: str) -> int:
        """How often it was called so far."""
        return self._calls.read_text().split().count(function) if self._calls.exists() else 0
