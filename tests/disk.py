"""A small disk of its own for a test, which can be filled up."""

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of some mebibytes, mounted at `path`."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        self._filling = path / "filling"

    def fill(self) -> None:
        """Leave no block free."""
        file = os.open(self._filling, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1024 * 1024, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(file, b"\0" * size)
            with contextlib.suppress(OSError):  # what is delayed must be on the disk, too
                os.fsync(file)
        finally:
            os.close(file)
        assert self.is_full()

    def is_full(self) -> bool:
        probe = self.path / "probe"
        try:
            probe.write_bytes(b"x" * 8192)
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            probe.unlink(missing_ok=True)
        return False

    def free(self) -> None:
        """Give the room back."""
        self._filling.unlink()

    def abort(self) -> None:
        """Have ext4 do what it does on errors: nothing can be written any more."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.path)], check=True)


@contextlib.contextmanager
def small_disk(kind: str, size_mib: int = 16) -> Iterator[SmallDisk]:
    """An ext4 or tmpfs of its own; the test is skipped where it cannot be mounted."""
    directory = Path(tempfile.mkdtemp(prefix="llmsup-"))
    path = directory / "disk"
    path.mkdir()
    try:
        _mount(kind, size_mib, directory, path)
        try:
            yield SmallDisk(path, kind)
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _mount(kind: str, size_mib: int, directory: Path, path: Path) -> None:
    commands = [["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(path)]]
    if kind == "ext4":
        image = directory / "image"
        image.touch()
        os.truncate(image, size_mib * 1024 * 1024)
        commands = [
            ["mkfs.ext4", "-q", "-m", "0", str(image)],
            ["mount", "-o", "loop", str(image), str(path)],
        ]
    for command in commands:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not there")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"no {kind} of our own can be mounted: {result.stderr.strip()}")
