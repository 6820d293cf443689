"""From kill -9 to the new process's main(): llmsup beside supervisord, interleaved in one run.

The child is bench/stamp.c, which writes the monotonic clock as the first thing it does, so the
figures include fork, execve and the loader. `python -m bench.respawn [--kills N]`
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.figures import line, spread, verdict
from tests.home import Home, wait_until

SUPERVISOR_CONF = """
[supervisord]
nodaemon=true
logfile={root}/supervisord.log
pidfile={root}/supervisord.pid
[program:stamp]
command={stamp} {root}/supervisor.stamps
autorestart=true
startsecs=0
startretries=1000000
"""


def stamps(path: Path) -> list[tuple[float, int]]:
    """(monotonic seconds, pid) of each time the child came up."""
    if not path.exists():
        return []
    rows = [text.split() for text in path.read_text().splitlines() if text.count(" ") == 1]
    return [(int(at) / 1e9, int(pid)) for at, pid in rows]


def kill_once(path: Path) -> float:
    """Seconds from SIGKILL of the newest child to the main() of its successor."""
    before = stamps(path)
    at = time.monotonic()
    os.kill(before[-1][1], signal.SIGKILL)
    wait_until(lambda: len(stamps(path)) > len(before), "a new process", pause_s=0.002)
    return stamps(path)[-1][0] - at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=15)
    arguments = parser.parse_args()
    if shutil.which("cc") is None:
        raise SystemExit(
            "error: no C compiler (cc) is installed; it makes the child that is killed"
        )
    root = Path(tempfile.mkdtemp(prefix="llmsup-respawn-"))
    stamp = root / "stamp"
    subprocess.run(["cc", "-O1", "-o", stamp, Path(__file__).with_name("stamp.c")], check=True)
    conf = root / "supervisord.conf"
    conf.write_text(SUPERVISOR_CONF.format(root=root, stamp=stamp))
    ours, theirs = root / "llmsup.stamps", root / "supervisor.stamps"
    home = Home()
    peer = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-c", conf], stdout=subprocess.DEVNULL
    )
    try:
        restart = {"backoff": "0s", "max_deaths": 1000}
        home.write(home.command("stamp", [str(stamp), str(ours)], restart=restart))
        home.start()
        wait_until(lambda: bool(stamps(theirs)), "supervisord's child")
        figures: dict[str, list[float]] = {"llmsup": [], "supervisord": []}
        for _ in range(arguments.kills):
            figures["llmsup"].append(kill_once(ours))
            figures["supervisord"].append(kill_once(theirs))
            time.sleep(0.05)
        print(f"kill -9 to main() of the successor, {arguments.kills} kills each, interleaved")
        for name, values in figures.items():
            line(name, spread(values))
        median = {name: statistics.median(values) for name, values in figures.items()}
        line("ratio", f"{median['supervisord'] / median['llmsup']:8.1f} times quicker")
        return 0 if verdict("llmsup, median", median["llmsup"] * 1000, 20, "ms") else 1
    finally:
        home.close()
        peer.terminate()
        peer.wait(10)
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
