import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmsup.errors import LaunchError
from llmsup.host import ports, procfs
from llmsup.host.ports import PortOwner

CHILDREN = Path(__file__).parent.parent / "stubs" / "children.py"


@contextmanager
def listening(family: int = socket.AF_INET, *, reuse_port: bool = False) -> Iterator[int]:
    with socket.socket(family) as listener:
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        yield port


@contextmanager
def holding(port: int, *wrapper: str) -> Iterator[int]:
    """A child in a session of its own that listens on `port`, or whose own child does."""
    command = [*wrapper, sys.executable, str(CHILDREN), "hold-port", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"holding\n"
            yield child.pid
        finally:
            os.killpg(child.pid, 9)


def has_ipv6() -> bool:
    try:
        with listening(socket.AF_INET6):
            return True
    except OSError:
        return False


FAMILIES = [
    socket.AF_INET,
    pytest.param(
        socket.AF_INET6, marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 loopback here")
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_owner_of_a_port_is_named(family: int) -> None:
    with listening(family) as port:
        (owner,) = ports.owners(port)

        assert owner.pid == os.getpid()
        assert ports.describe(owner) == f"pid {os.getpid()} ({procfs.command(os.getpid())})"
        assert not ports.is_free(port)

    assert ports.owners(port) == []
    assert ports.is_free(port)


def test_owner_that_is_another_process() -> None:
    port = ports.free_port(())
    with holding(port) as pid:
        (owner,) = ports.owners(port)

        assert owner.pid == pid
        assert "children.py hold-port" in ports.describe(owner)


def test_connections_are_no_owners() -> None:
    with listening() as port, socket.create_connection(("127.0.0.1", port)) as client:
        local: int = client.getsockname()[1]

        assert len(ports.owners(port)) == 1
        assert ports.owners(local) == []
        assert not ports.is_free(local)


def test_owner_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        monkeypatch.setattr(procfs, "pids", lambda: iter(()))
        (owner,) = ports.owners(port)

        assert owner.pid is None
        assert ports.describe(owner) == "a process that cannot be seen from here"
        assert ports.strangers(port, os.getpgrp()) == [owner]


@pytest.mark.parametrize(
    ("uid", "words"),
    [(0, "a process of user root"), (4_000_000_000, "a process of uid 4000000000")],
)
def test_owner_of_another_user(uid: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)

    assert ports.describe(PortOwner(None, "", uid, 1, 8001)) == words


def test_command_lines_are_cut_to_a_line() -> None:
    program = [sys.executable, "-c", "import sys; sys.stdin.read()", "a\nb\x1b[2J", "x" * 200]
    with subprocess.Popen(program, stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 10
        while "import sys" not in (command := procfs.command(child.pid)):
            assert time.monotonic() < deadline
        assert child.stdin is not None
        child.stdin.close()

    assert len(command) == 80
    assert command.isprintable()
    assert command.endswith("…")


def test_group_owns_a_port_alone() -> None:
    port = ports.free_port(())
    with holding(port) as pid:
        assert ports.strangers(port, pid) == []
        assert [owner.pid for owner in ports.strangers(port, os.getpid())] == [pid]


def test_group_owns_the_port_of_a_grandchild() -> None:
    port = ports.free_port(())
    with holding(port, "sh", "-c", '"$@"; true', "sh") as pid:
        (owner,) = ports.owners(port)

        assert owner.pid != pid
        assert ports.strangers(port, pid) == []


def test_stranger_that_shares_the_port_is_found() -> None:
    """Given SO_REUSEPORT on both sides, bind succeeds, and only this look tells."""
    with listening(reuse_port=True) as port, holding(port) as pid:
        assert len(ports.owners(port)) == 2
        assert [owner.pid for owner in ports.strangers(port, pid)] == [os.getpid()]


def test_nobody_is_no_stranger() -> None:
    assert ports.strangers(ports.free_port(()), os.getpid()) == []


def test_free_port_is_free_and_not_avoided() -> None:
    port = ports.free_port(())
    everything_else = set(range(65536)) - {port}

    assert ports.is_free(port)
    assert ports.free_port(everything_else) == port
    assert ports.free_port({port}) != port


def test_no_port_left_is_said() -> None:
    with pytest.raises(LaunchError, match="no port from"):
        ports.free_port(range(65536))
