"""A card without a GPU: llama-server loads models on it, NVML tells of it, and it runs full.

tests/stubs/ggml_card.cpp is the device, tests/stubs/nvml.c the driver; both read what is written
here, and both see what every llama-server takes.
"""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from tests import engine_headers
from tests.cards import MIB, StubCards
from tests.home import STUBS

_SOURCES = ("ggml_card.cpp", "ggml_card_fusions.h", "ggml_card_rules.h", "card.h", "preload.c")


def why_not() -> str:
    """What is missing for it here, and what to do about it; empty: nothing."""
    for program in ("cc", "c++"):
        if shutil.which(program) is None:
            return f"no compiler ({program})"
    if not engine_headers.are_there():
        return "no headers of the installed engine: python -m tests.engine_headers"
    return ""


def build(directory: Path) -> Path:
    """Compile the device into `directory`, once however many ask at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    device, preload = directory / "libggml-card.so", directory / "preload.so"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max((STUBS / name).stat().st_mtime for name in _SOURCES)
        if not device.exists() or device.stat().st_mtime < newest:
            subprocess.run(
                ["cc", "-shared", "-fPIC", "-o", preload, STUBS / "preload.c", "-ldl"], check=True
            )
            subprocess.run(
                [
                    *("c++", "-std=c++17", "-O1", "-shared", "-fPIC"),
                    *("-isystem", engine_headers.HEADERS),
                    *("-o", device, STUBS / "ggml_card.cpp"),
                ],
                check=True,
            )
    return directory


class StandIn(StubCards):
    """One card; `environ` makes a daemon and its llama-servers see it and no other.

    `reserved_mib` is what the driver keeps, `overhead_mib` what each process takes beside its
    buffers. `linger_ms`: so long is the memory of a dead process taken after somebody first looked.
    `no_data`: models of any size load, but nothing is kept of them and they cannot answer.
    """

    def __init__(
        self,
        directory: Path,
        library: Path,
        *,
        total_mib: int = 6141,
        reserved_mib: int = 241,
        overhead_mib: int = 107,
        linger_ms: int = 0,
        no_data: bool = False,
    ) -> None:
        super().__init__(directory)
        self._total_bytes, self._reserved_bytes = total_mib * MIB, reserved_mib * MIB
        self._knobs = [f"overhead {overhead_mib * MIB}", f"linger {linger_ms}"]
        self._outside_bytes = self._work_bytes = 0
        self.environ |= {
            "GGML_BACKEND_PATH": str(library / "libggml-card.so"),
            "LD_PRELOAD": str(library / "preload.so"),
        }
        if no_data:
            self._knobs.append("no-data")
            self.environ["NVML_STUB_NO_DATA"] = "1"
        self._write()

    def take(self, mib: int) -> None:
        """A program that is no llama-server takes so much more."""
        self._outside_bytes += mib * MIB
        self._write()

    def need(self, mib: int) -> None:
        """Whatever is computed from now on takes so much more, as a driver may want."""
        self._work_bytes = mib * MIB
        self._write()

    def give_back(self) -> None:
        """Such programs have nothing left."""
        self._outside_bytes = 0
        self._write()

    @property
    def free_mib(self) -> float:
        """What NVML would tell, but for memory that lingers."""
        users = sum(used for _, used in self._users())
        return (self._total_bytes - self._reserved_bytes - self._outside_bytes - users) / MIB

    def used_by(self, pid: int) -> float:
        """MiB that the process has on the card; 0: it has nothing there."""
        return sum(used for user, used in self._users() if user == pid) / MIB

    def _users(self) -> list[tuple[int, int]]:
        """Every living process on the card and its bytes."""
        path = self._state.with_name(f"{self._state.name}.processes")
        if not path.exists():
            return []
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = [line.split() for line in file]
        return [
            (int(pid), int(used))
            for _, pid, started, _, used, _ in lines
            if _started(int(pid)) == int(started)
        ]

    def _write(self) -> None:
        free = max(self._total_bytes - self._reserved_bytes - self._outside_bytes, 0)
        line = self.card(total=self._total_bytes, free=free, used=self._outside_bytes)
        self.write(*self._knobs, f"work {self._work_bytes}", line)


def _started(pid: int) -> int:
    """As the device writes it; 0 for a zombie and for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def shared_directory(base: Path) -> Path:
    """Of all workers of one run of the tests, where `base` is a worker's own."""
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "card"
