"""A daemon with nothing to do is nearly free, and stays as small as it was."""

import json
import os
import re
import time
import urllib.request
from pathlib import Path

import pytest

from tests.home import Home, free_ports, stub, wait_until

SERVICES = 6
PROBE_CYCLES = 10_000


def start_probed(home: Home, period: str) -> list[int]:
    """Six ready services whose probes are counted by the stubs; their ports."""
    ports = free_ports(SERVICES)
    readiness = {"http_get": "/probe", "period": period}
    services = (
        home.command(f"s{port}", stub("upstream.py", "--port", port), port=port,
                     readiness=readiness)
        for port in ports
    )  # fmt: skip
    home.write("".join(services))
    home.start()
    return ports


def daemon_pid(home: Home) -> int:
    pid = home.daemon_pid()
    assert pid is not None, home.daemon_log()
    return pid


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(r"\nPrivate_\w+: +(\d+) kB", text))


def open_files(pid: int) -> int:
    """Of many looks the least: a probe that is under way has a socket."""
    least = 10_000
    for _ in range(200):
        least = min(least, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
        time.sleep(0.005)
    return least


def probes(ports: list[int]) -> int:
    total = 0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stub", timeout=10) as answer:
            total += json.load(answer)["requests"]["/probe"]
    return total


def test_an_idle_daemon_takes_next_to_no_cpu_time(home: Home) -> None:
    start_probed(home, period="2s")
    pid = daemon_pid(home)
    time.sleep(2.0)

    before, started = cpu_s(pid), time.monotonic()
    time.sleep(8.0)
    share = (cpu_s(pid) - before) / (time.monotonic() - started)

    assert share < 0.015


@pytest.mark.timeout(500)
def test_ten_thousand_probes_leave_nothing_behind(home: Home) -> None:
    ports = start_probed(home, period="10ms")
    pid = daemon_pid(home)

    def wait_probes(count: int) -> None:
        wait_until(lambda: probes(ports) > count, f"{count} probes", 240.0, pause_s=0.25)

    wait_probes(2000)
    files, size_bytes = open_files(pid), private_bytes(pid)
    wait_probes(2000 + PROBE_CYCLES)

    assert open_files(pid) == files
    assert private_bytes(pid) - size_bytes < 1024 * 1024
