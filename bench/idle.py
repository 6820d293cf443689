"""What a daemon costs that has nothing to do: six ready services, probed at the default period.

supervisord keeps six programs beside it, which it does not probe. CPU time is that of the daemon
alone, as the scheduler counts it. `python -m bench.idle [--seconds N]`
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import line, verdict
from llmsup.host.probe import probe
from llmsup.services.launch import Target, Via
from tests.home import Home, free_ports, stub, wait_until

NAMES = tuple(f"service-{number}" for number in range(6))
PROBES = 2000
LIMIT_PERCENT = 0.5
SUPERVISOR_CONF = """
[supervisord]
nodaemon=true
logfile={root}/supervisord.log
pidfile={root}/supervisord.pid
"""


def cpu_s(pid: int) -> float:
    """CPU time of all threads so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def percent(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """Percent of one core that each process took during the same seconds."""
    before, started = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started
    return {name: (cpu_s(pid) - before[name]) / elapsed_s * 100 for name, pid in pids.items()}


@contextmanager
def supervisord(root: Path) -> Iterator[int]:
    conf = root / "supervisord.conf"
    programs = "".join(f"[program:{name}]\ncommand=sleep 100000\n" for name in NAMES)
    conf.write_text(SUPERVISOR_CONF.format(root=root) + programs)
    peer = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-c", conf], stdout=subprocess.DEVNULL
    )
    try:
        log = root / "supervisord.log"
        wait_until(
            lambda: log.exists() and log.read_text().count("RUNNING") == len(NAMES), "the programs"
        )
        yield peer.pid
    finally:
        peer.terminate()
        peer.wait(10)


def started(home: Home) -> tuple[int, list[int]]:
    """The pid of a daemon whose services are ready, and their ports."""
    ports = free_ports(len(NAMES))
    home.write(
        "".join(
            home.command(name, stub("upstream.py", "--port", port), port=port,
                         readiness={"http_get": "/health"})
            for name, port in zip(NAMES, ports, strict=True)
        )
    )  # fmt: skip
    home.start()
    pid = home.daemon_pid()
    if pid is None:
        raise SystemExit(f"error: the daemon has ended: {home.daemon_log()}")
    return pid, ports


async def _probe_all(port: int) -> float:
    target = Target(Via.HTTP, port=port, path="/health")
    for _ in range(PROBES // 10):
        await probe(target, 3.0)
    before = time.process_time()
    for _ in range(PROBES):
        await probe(target, 3.0)
    return (time.process_time() - before) / PROBES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    home = Home()
    try:
        with tempfile.TemporaryDirectory(prefix="llmsup-idle-") as directory:
            pid, ports = started(home)
            with supervisord(Path(directory)) as peer:
                time.sleep(3.0)  # both have come to rest
                shares = percent({"llmsup": pid, "supervisord": peer}, arguments.seconds)
            probe_s = asyncio.run(_probe_all(ports[0]))
    finally:
        home.close()
    print(f"{arguments.seconds:g} s with six ready services")
    line("supervisord, which does not probe", f"{shares['supervisord']:8.2f} % of a core")
    line("one probe, CPU time", f"{probe_s * 1e6:8.0f} µs")
    return 0 if verdict("llmsup", shares["llmsup"], LIMIT_PERCENT, "% of a core") else 1


if __name__ == "__main__":
    sys.exit(main())
