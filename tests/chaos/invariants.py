"""What must hold once a fault is over. Each check returns what is wrong, empty where nothing is."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmsup.drill.traffic import Record
from llmsup.errors import LlmsupError
from llmsup.evidence import KEPT
from llmsup.host import bundles, procfs
from tests.chaos.faults import GATEWAY, Fault, Shape, may_be_unavailable, takes_gateway
from tests.chaos.stack import REVISION, ChaosStack
from tests.home import Home, is_alive

CONTROL_FDS = 2
"""Descriptors that come and go: a request to the control socket or a probe in flight."""


def is_whole(stack: ChaosStack) -> str:
    """Every service of the profile is ready as the profile says now, and Envoy has the lists."""
    try:
        status, upstreams = stack.home.status(), stack.home.upstreams()
    except LlmsupError as error:
        return error.message
    return _services_are_whole(stack.shape, status) or _lists_are_whole(stack.shape, upstreams)


def _services_are_whole(shape: Shape, status: dict[str, Any]) -> str:
    states = {each["service"]: each["state"] for each in status["services"]}
    if states != dict.fromkeys((GATEWAY, *shape.services), "ready"):
        return f"not all are ready: {states}"
    for each in status["services"]:
        name = each["service"]
        if each["pid"] is None or not is_alive(each["pid"]):
            return f"the death of {name} has not been noticed"
        revision = procfs.environ(each["pid"]).get(REVISION.encode(), b"").decode()
        if name != GATEWAY and revision != str(shape.revisions.get(name, 0)):
            return f"{name} runs revision {revision}, not {shape.revisions.get(name, 0)}"
    return ""


def _lists_are_whole(shape: Shape, upstreams: Sequence[dict[str, Any]]) -> str:
    lists = {each["route"]: each for each in upstreams}
    if lists.keys() != shape.routes.keys():
        return f"routes are {sorted(lists)}, not {sorted(shape.routes)}"
    for route, services in shape.routes.items():
        for side in ("desired", "published", "confirmed"):
            if lists[route][side] != list(services):
                return f"{route}: {side} is {lists[route][side]}, not {list(services)}"
    return ""


def no_orphan(stack: ChaosStack) -> str:
    """Every process of this home is the one of a service."""
    pids = {each["service"]: each["pid"] for each in stack.home.status()["services"]}
    expected = {*pids.values(), procfs.parent(pids[GATEWAY])}  # Envoy has a parent of its own
    others = set(stack.home.processes()) - expected
    return "".join(f"pid {pid} is of nobody: {procfs.command(pid)}; " for pid in sorted(others))


def no_zombie(stack: ChaosStack) -> str:
    daemon = stack.home.daemon_pid()
    zombies = [pid for pid in procfs.pids() if procfs.parent(pid) == daemon and is_zombie(pid)]
    return f"zombies of the daemon: {zombies}" if zombies else ""


def is_zombie(pid: int) -> bool:
    return procfs.read(pid, "stat").rpartition(b")")[2].split()[:1] == [b"Z"]


def no_leaked_port(stack: ChaosStack) -> str:
    """Each process listens on its own port and on nothing else; the daemon on none."""
    status = stack.home.status()
    expected = {each["pid"]: {each["port"]} for each in status["services"]}
    expected[status["daemon"]["pid"]] = set()
    listening = listening_ports()
    for pid, ports in expected.items():
        found = {listening[inode] for inode in sockets(pid) if inode in listening}
        if found != ports:
            return f"pid {pid} listens on {sorted(found)}, not on {sorted(ports)}"
    return ""


def listening_ports() -> dict[str, int]:
    """Inode → port of every listening TCP socket."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found


def sockets(pid: int) -> Iterable[str]:
    for link in descriptors(pid):
        if link.startswith("socket:["):
            yield link[8:-1]


def descriptors(pid: int) -> Sequence[str]:
    """What each open descriptor of the process refers to; nothing where it is gone."""
    links = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                links.append(str(entry.readlink()))
    return links


EVIDENCE = re.compile(r"state/crashes(/\w[^/]*(/(death\.json|output\.log))?)?")
"""Crash bundles in full: one that was never finished has a dot in front."""


class Leaks:
    """What the daemon and its home held when nothing had been broken yet."""

    def __init__(self, stack: ChaosStack) -> None:
        self._fds = self._open(stack)
        self._files = files(stack.home)
        self._shared: set[Path] = set()

    def no_leaked_fd(self, stack: ChaosStack) -> str:
        """As many descriptors as at first; each service more costs one, its pidfd."""
        fds, allowed = self._open(stack), self._fds + CONTROL_FDS
        if fds <= allowed:
            return ""
        pid = stack.home.daemon_pid()
        links = sorted(descriptors(pid)) if pid else []
        return f"the daemon has {fds} descriptors, not {allowed}: {links}"

    def no_leaked_file(self, stack: ChaosStack) -> str:
        """No file that was not there at first, save those of `extra`, rotated logs and evidence."""
        new = {
            name
            for name in files(stack.home) - self._files
            if "extra" not in name and not EVIDENCE.fullmatch(name)
        }
        if new:
            return f"files left behind: {sorted(new)}"
        deaths = Counter(bundle.service for bundle in bundles.found(stack.home.paths.crashes))
        kept = {name: count for name, count in deaths.items() if count > KEPT}
        return f"more crash bundles than {KEPT}: {kept}" if kept else ""

    def no_leaked_memory(self, stack: ChaosStack) -> str:
        """Nothing in /dev/shm that a process of ours had mapped and none has any more."""
        mapped = {path for pid in stack.home.processes() for path in shared_memory(pid)}
        self._shared |= mapped
        left = sorted(str(path) for path in self._shared - mapped if path.exists())
        return f"shared memory left behind: {left}" if left else ""

    @staticmethod
    def _open(stack: ChaosStack) -> int:
        pid = stack.home.daemon_pid()
        return len(descriptors(pid)) - len(stack.shape.services) if pid else 0


def files(home: Home) -> set[str]:
    return {str(path.relative_to(home.root)) for path in home.root.rglob("*")}


def shared_memory(pid: int) -> set[Path]:
    lines = procfs.read(pid, "maps").decode(errors="replace").splitlines()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}


def checks(leaks: Leaks) -> tuple[Callable[[ChaosStack], str], ...]:
    return (
        no_orphan,
        no_zombie,
        no_leaked_port,
        leaks.no_leaked_fd,
        leaks.no_leaked_file,
        leaks.no_leaked_memory,
    )


def unexcused(
    fault: Fault, route: str, records: Sequence[Record], killed_at: float
) -> list[Record]:
    """The failed requests of the route that the fault does not excuse.

    While the gateway is away connections break; with the first answer of a request sent since then
    it serves again. A 503 is honest where every upstream was down and it says when to come again.
    """
    answered = (r.answered_at for r in records if not r.failed and r.sent_at > killed_at)
    served_at = min(answered, default=killed_at)
    return [
        record
        for record in records
        if record.failed
        and not (takes_gateway(fault) and record.sent_at <= served_at)
        and not (may_be_unavailable(fault, route) and is_honest(record))
    ]


def is_honest(record: Record) -> bool:
    return record.status == 503 and bool(record.retry_after)
