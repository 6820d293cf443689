"""The `qdrant` kind: with the stand-in, and with the real server where this machine has one."""

import os
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.home import STUBS, Home, free_ports, stub, wait_until

REAL = os.environ.get("LLMSUP_QDRANT") or shutil.which("qdrant")


def stand_in(home: Home) -> str:
    """An executable `qdrant` that is the stand-in."""
    script = home.root / "qdrant-standin"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {STUBS / "qdrant_standin.py"} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    "binary",
    [
        "stand-in",
        pytest.param(
            "real", marks=pytest.mark.skipif(REAL is None, reason="no qdrant on this machine")
        ),
    ],
)
def test_its_dependent_waits_and_it_comes_back_when_killed(home: Home, binary: str) -> None:
    """Given rag depends on Qdrant, rag starts when it is ready, and survives its death."""
    home.environ["LLMSUP_QDRANT"] = stand_in(home) if binary == "stand-in" else str(REAL)
    http, grpc, rag = free_ports(3)
    text = f'[service.qdrant]\nkind = "qdrant"\nport = {http}\ngrpc_port = {grpc}\n'
    command = stub("upstream.py", "--port", rag, "--name", "rag")
    text += home.command("rag", command, port=rag, depends_on=["qdrant"])
    home.write(text)
    home.start()
    first = home.service("qdrant")
    assert (first["kind"], first["port"]) == ("qdrant", http)
    assert (home.paths.state / "qdrant").is_dir()
    with urllib.request.urlopen(f"http://127.0.0.1:{http}/collections", timeout=5) as response:
        assert response.status == 200

    killed_at = time.monotonic()
    os.kill(first["pid"], signal.SIGKILL)
    again = home.wait_replaced(first)

    assert time.monotonic() - killed_at < 20.0
    assert again["restarts"] == 1
    assert home.service("rag")["generation"] == 1
    assert home.cli("stop").returncode == 0
    assert home.processes() == []


def test_without_a_binary_it_fails_alone_and_says_where_to_put_one(home: Home) -> None:
    home.environ.pop("LLMSUP_QDRANT", None)
    home.environ["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    (http, grpc) = free_ports(2)
    text = f'[service.qdrant]\nkind = "qdrant"\nport = {http}\ngrpc_port = {grpc}\n'
    text += '[service.other]\nkind = "command"\ncommand = ["sleep", "1000"]\n'
    home.write(text)
    result = home.cli("start", str(home.profile))
    assert result.returncode == 1
    assert "qdrant is not installed" in result.stdout + result.stderr
    assert "LLMSUP_QDRANT" in home.service("qdrant")["why"]
    wait_until(lambda: home.service("other")["state"] == "ready", "the other service")
