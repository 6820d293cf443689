"""What `llmsup status` costs beside `supervisorctl status`, six services each, interleaved.

`python -m bench.status [--rounds N]`
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.figures import line, spread, verdict
from tests.home import Home, wait_until

SUPERVISOR_CONF = """
[unix_http_server]
file={root}/supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisord]
nodaemon=true
logfile={root}/supervisord.log
pidfile={root}/supervisord.pid
[supervisorctl]
serverurl=unix://{root}/supervisor.sock
"""
NAMES = tuple(f"service-{number}" for number in range(6))


def timed(command: list[str], home: Home) -> float:
    started = time.perf_counter()
    result = subprocess.run(command, env=home.environ, stdout=subprocess.DEVNULL, check=False)
    elapsed_s = time.perf_counter() - started
    if result.returncode:
        raise SystemExit(f"{command[0]} ended with status {result.returncode}")
    return elapsed_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmsup-status-") as directory:
        root = Path(directory)
        conf = root / "supervisord.conf"
        programs = "".join(f"[program:{name}]\ncommand=sleep 1000\nstartsecs=0\n" for name in NAMES)
        conf.write_text(SUPERVISOR_CONF.format(root=root) + programs)
        scripts = Path(sys.executable).parent
        home = Home()
        peer = subprocess.Popen([scripts / "supervisord", "-c", conf], stdout=subprocess.DEVNULL)
        try:
            home.write("".join(home.command(name, ["sleep", "1000"]) for name in NAMES))
            home.start()
            wait_until((root / "supervisor.sock").exists, "supervisord")
            commands = {
                "llmsup status": [str(scripts / "llmsup"), "status"],
                "supervisorctl status": [str(scripts / "supervisorctl"), "-c", str(conf), "status"],
            }
            figures: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(arguments.rounds):
                for name, command in commands.items():
                    figures[name].append(timed(command, home))
        finally:
            home.close()
            peer.terminate()
            peer.wait(10)
    print(f"{arguments.rounds} rounds, interleaved, six services each")
    for name, values in figures.items():
        line(name, spread(values))
    ours, theirs = (statistics.median(values) for values in figures.values())
    return 0 if verdict("ratio of the medians", ours / theirs, 1.5, "") else 1


if __name__ == "__main__":
    sys.exit(main())
