"""`llmsup status` is typed all the time and asked by prompts: it imports only what it needs."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

HEAVY = {
    "asyncio", "hypothesis", "httpx", "llmsup.config.load", "llmsup.daemon", "msgspec", "pydantic",
    "pynvml", "rich", "starlette", "subprocess", "typer", "uvicorn",
}  # fmt: skip

PROGRAM = """
import sys
from llmsup.cli.main import main
status = main(["status"])
print(status, *sys.modules)
"""


INTERRUPTED = """
import sys
from importlib.abc import MetaPathFinder
from llmsup.cli.main import main

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.exit(main(["status"]))
"""


def test_status_imports_neither_frameworks_nor_the_loader() -> None:
    with TemporaryDirectory(prefix="llmsup-") as home:  # a socket's path has to be short
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "LLMSUP_HOME": home},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )

    status, *modules = done.stdout.split()

    assert (status, done.stderr) == ("3", "error: llmsup is not running\nhint: llmsup start\n")
    assert HEAVY.intersection(modules) == set()


@pytest.mark.parametrize("module", ["llmsup.cli.terminal", "llmsup.cli.status", "llmsup.errors"])
def test_ctrl_c_during_imports_is_quiet(tmp_path: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module],
        env={**os.environ, "LLMSUP_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
