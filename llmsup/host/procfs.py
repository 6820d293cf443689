"""What /proc says about processes. A process that has gone, or may not be read, is just absent."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_RCHAR = re.compile(rb"^rchar: (\d+)$", re.MULTILINE)
_PEAK_RSS_KIB = re.compile(rb"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_REAL_UID = re.compile(rb"^Uid:\t(\d+)", re.MULTILINE)
_TRACER = re.compile(rb"^TracerPid:\s+([1-9]\d*)$", re.MULTILINE)
_RCHAR_STEP_BYTES = 64 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What a process has used so far, those of its children included that have ended."""

    cpu_s: float = 0.0
    major_faults: int = 0


def pids() -> Iterator[int]:
    """Every process there is."""
    with os.scandir(PROC) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield int(entry.name)


def read(pid: int, file: str) -> bytes:
    """A file of one process; empty where it has gone or belongs to another user."""
    try:
        return (PROC / str(pid) / file).read_bytes()
    except OSError:
        return b""


def environ(pid: int) -> dict[bytes, bytes]:
    """The environment a process was started with."""
    entries = (entry.partition(b"=") for entry in read(pid, "environ").split(b"\0"))
    return {key: value for key, separator, value in entries if separator}


def command(pid: int, *, max_chars: int = 80) -> str:
    """The command line on one line, for a person; the bare name where there is none."""
    words = read(pid, "cmdline").rstrip(b"\0").split(b"\0")
    program = os.path.basename(words[0])  # noqa: PTH119 (bytes, and not always a path)
    line = b" ".join([program, *words[1:]]) or read(pid, "comm")
    text = _CONTROL.sub(" ", line.decode(errors="replace")).strip()
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def group_and_session(pid: int) -> tuple[int, int]:
    """Process group and session; (0, 0) where the process has gone."""
    fields = _fields_after_name(pid)
    return (int(fields[2]), int(fields[3])) if fields else (0, 0)


def real_uid(pid: int) -> int | None:
    """Who started it, also where it is a set-uid program; None where the process has gone."""
    found = _REAL_UID.search(read(pid, "status"))
    return int(found[1]) if found else None


def parent(pid: int) -> int:
    """The parent; 0 where the process has gone."""
    fields = _fields_after_name(pid)
    return int(fields[1]) if fields else 0


def start_ticks(pid: int) -> int:
    """When the process was started, in clock ticks since the boot; 0 where it has gone.

    With the pid it names a process once and for all: pids are recycled.
    """
    fields = _fields_after_name(pid)
    return int(fields[19]) if fields else 0


def is_zombie(pid: int) -> bool:
    """Whether the process has ended and is not reaped yet; False where it has gone."""
    return _fields_after_name(pid)[:1] == [b"Z"]


def boot_id() -> str:
    """Changes with every boot of the machine."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def counter(file: Path, name: str) -> int:
    """The number behind `name` in a file of "name number" lines; 0 where it is not told."""
    try:
        for line in file.read_text().splitlines():
            key, _, number = line.partition(" ")
            if key == name:
                return int(number)
    except (OSError, ValueError):
        pass
    return 0


def oom_kills() -> int:
    """Processes of the whole machine that the kernel has killed for memory since the boot."""
    return counter(PROC / "vmstat", "oom_kill")


def machine_memory() -> tuple[int, int]:
    """Bytes of memory of the machine: all, and what new processes could get. 0 if not told."""
    found = {"MemTotal:": 0, "MemAvailable:": 0}
    with suppress(OSError, ValueError):
        for line in (PROC / "meminfo").read_text().splitlines():
            name, *rest = line.split()
            if name in found:
                found[name] = int(rest[0]) * 1024
    return found["MemTotal:"], found["MemAvailable:"]


def resident_bytes(pid: int) -> int:
    """Memory that a process fills; 0 where it has gone."""
    fields = read(pid, "statm").split()
    return int(fields[1]) * _PAGE_BYTES if fields else 0


def age_s(pid: int) -> float:
    """How long ago a process was started; 0 where it has gone."""
    ticks = start_ticks(pid)
    return (
        max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _TICKS_PER_S) if ticks else 0.0
    )


def descendants(pid: int) -> list[int]:
    """`pid`, its children, their children, and so on."""
    found = [pid]
    for parent in found:
        try:
            threads = os.listdir(PROC / str(parent) / "task")  # noqa: PTH208 (names, not paths)
        except OSError:
            continue
        for thread in threads:
            found += [int(child) for child in read(parent, f"task/{thread}/children").split()]
    return found


def state(pid: int) -> str:
    """One letter: R, S, D, T (stopped by a signal), t (by a debugger), Z; "" where it has gone."""
    fields = _fields_after_name(pid)
    return fields[0].decode() if fields else ""


def is_traced(pid: int) -> bool:
    """Whether a debugger holds it."""
    return _TRACER.search(read(pid, "status")) is not None


def usage(pid: int) -> Usage:
    """CPU time and pages read from disk; zero where it has gone."""
    fields = _fields_after_name(pid)
    if not fields:
        return Usage()
    return Usage(
        cpu_s=sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S,
        major_faults=int(fields[9]) + int(fields[10]),
    )


def bytes_taken_in(pid: int) -> int:
    """How much of its files a process has read or mapped so far, by what it has of them at least.

    0 where it has gone.
    """
    rchar = _RCHAR.search(read(pid, "io"))
    return max(int(rchar[1]) if rchar else 0, resident_bytes(pid))


def work_done(pid: int) -> int:
    """A sum of counters that only grow while a process reads or fills memory.

    Pages of a mapped file count as major faults and as memory, not as bytes read. Bytes read are
    counted in coarse steps, so that answering a probe is no work; CPU time is not counted at all,
    since a busy loop has it too.
    """
    fields = _fields_after_name(pid)
    major_faults = int(fields[9]) if fields else 0
    rchar = _RCHAR.search(read(pid, "io"))
    peak_rss_kib = _PEAK_RSS_KIB.search(read(pid, "status"))
    return (
        major_faults
        + (int(rchar[1]) // _RCHAR_STEP_BYTES if rchar else 0)
        + (int(peak_rss_kib[1]) if peak_rss_kib else 0)
    )


def _fields_after_name(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on: a program's name may hold anything."""
    return read(pid, "stat").rpartition(b")")[2].split()
