"""Who listens on a TCP port, and which ports are free."""

import errno
import os
import pwd
import secrets
import socket
from collections.abc import Collection, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmsup.errors import LaunchError
from llmsup.host import procfs

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED, _LISTEN = "01", "0A"
# Below 32768, where the kernel takes the local ports of outgoing connections from.
_CHOSEN = range(20000, 32000)


@dataclass(frozen=True)
class PortOwner:
    """A process that listens on `port`, and its socket. `pid` is None where we may not see it."""

    pid: int | None
    command: str
    uid: int
    inode: int
    port: int


def owners(port: int) -> list[PortOwner]:
    """The processes that listen on `port`, on any address, IPv4 or IPv6."""
    sockets = _listening(port)
    if not sockets:
        return []
    holders = list(_holders(sockets.keys()))
    found = [
        PortOwner(pid, procfs.command(pid), sockets[inode], inode, port) for pid, inode in holders
    ]
    hidden = sockets.keys() - {inode for _, inode in holders}
    return found + [PortOwner(None, "", sockets[inode], inode, port) for inode in sorted(hidden)]


def describe(owner: PortOwner) -> str:
    """For a person: "pid 123 (python -m http.server)"."""
    if owner.pid is not None:
        return f"pid {owner.pid} ({owner.command})"
    if owner.uid == os.getuid():
        return "a process that cannot be seen from here"
    with suppress(KeyError):
        return f"a process of user {pwd.getpwuid(owner.uid).pw_name}"
    return f"a process of uid {owner.uid}"


def strangers(port: int, pid: int) -> list[PortOwner]:
    """Who listens on `port` without being of the process group or session that `pid` leads.

    With SO_REUSEPORT a stranger can listen there too and get a share of the connections.
    """
    return [
        owner
        for owner in owners(port)
        if owner.pid is None or pid not in procfs.group_and_session(owner.pid)
    ]


def has_socket(port: int, pids: Iterable[int]) -> bool:
    """Whether one of the processes listens on `port`, or has a connection that came in there."""
    return any(each.port == port for each in _held_by(pids))


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of 127.0.0.1 and would be alone there."""
    if _listening(port):
        return False
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def free_port(avoid: Container[int]) -> int:
    """A free port that is not in `avoid`. Raises LaunchError where there is none."""
    first = secrets.randbelow(len(_CHOSEN))
    for index in range(len(_CHOSEN)):
        port = _CHOSEN[(first + index) % len(_CHOSEN)]
        if port not in avoid and is_free(port):
            return port
    raise LaunchError(
        f"no port from {_CHOSEN.start} to {_CHOSEN.stop - 1} is free", hint="set `port`"
    )


def listened_to(pids: Iterable[int]) -> frozenset[int]:
    """The ports on which any of these processes listens."""
    return frozenset(each.port for each in _held_by(pids) if each.state == _LISTEN)


def is_connected_to(ports: Collection[int]) -> bool:
    """Whether any connection to one of these ports of this machine is open."""
    return any(each.state == _ESTABLISHED and each.port in ports for each in _table())


def have_asked(pids: Iterable[int]) -> bool:
    """Whether any of these processes has a connection open that it made itself."""
    theirs = _held_by(pids)
    listened = {each.port for each in theirs if each.state == _LISTEN}
    return any(each.state == _ESTABLISHED and each.port not in listened for each in theirs)


@dataclass(frozen=True)
class _Socket:
    """A TCP socket of this machine: its own port, its state as the kernel writes it, its owner."""

    port: int
    state: str
    uid: int
    inode: int


def _table() -> Iterator[_Socket]:
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:  # no IPv6 on this machine
            continue
        for line in lines:
            _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
            yield _Socket(int(local.rpartition(":")[2], 16), state, int(uid), int(inode))


def _held_by(pids: Iterable[int]) -> list[_Socket]:
    """The sockets that one of these processes has open."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    return [each for each in _table() if each.inode in inodes]


def _listening(port: int) -> dict[int, int]:
    """Inode and uid of each socket that listens on `port`."""
    return {it.inode: it.uid for it in _table() if it.state == _LISTEN and it.port == port}


def _holders(inodes: Container[int]) -> Iterator[tuple[int, int]]:
    """Each (pid, inode) where the process has the socket open. Other users' are not seen."""
    for pid in procfs.pids():
        for inode in _sockets(pid):
            if inode in inodes:
                yield pid, inode


def _sockets(pid: int) -> set[int]:
    found = set()
    with suppress(OSError), os.scandir(procfs.PROC / str(pid) / "fd") as entries:
        for entry in entries:
            with suppress(OSError):
                link = os.readlink(entry.path)  # noqa: PTH115 (thousands of them, in a hurry)
                if link.startswith("socket:["):
                    found.add(int(link[8:-1]))
    return found
