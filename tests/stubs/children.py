"""Children that behave, and children that do not. `python children.py MODE [OPTIONS]`.

Every mode can also `--count FILE`: append a line with its pid at each start.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn


def sleep_forever() -> NoReturn:
    while True:
        time.sleep(3600)


def ok(arguments: argparse.Namespace) -> None:
    """Answer GET /health with 200; with --slow-start S, first 503 "Loading model" for S seconds."""
    serve(arguments.port, loading_s=arguments.slow_start)


def never_ready(arguments: argparse.Namespace) -> None:
    """Answer every request with 503."""
    serve(arguments.port, loading_s=float("inf"))


def ignore_sigterm(arguments: argparse.Namespace) -> None:
    """Only SIGKILL ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ignoring", flush=True)
    if arguments.port:
        serve(arguments.port)
    sleep_forever()


def fork_grandchildren(arguments: argparse.Namespace) -> None:
    """One grandchild in the group, one in a session of its own; prints both pids."""
    program = [sys.executable, __file__, "ignore-sigterm"]
    quiet = subprocess.DEVNULL
    near = subprocess.Popen(program, stdout=quiet)
    far = subprocess.Popen(program, stdout=quiet, start_new_session=True)
    print(near.pid, far.pid, flush=True)
    if arguments.port:
        serve(arguments.port)
    sleep_forever()


def exit_at_once(arguments: argparse.Namespace) -> None:
    """Exit with --code, after a line on stderr."""
    print(f"error: exiting with {arguments.code}", file=sys.stderr)
    sys.exit(arguments.code)


def flood(arguments: argparse.Namespace) -> None:
    """Print --bytes in numbered lines of 100 bytes, then stay."""
    lines = 1000
    for first in range(0, arguments.bytes // 100, lines):
        numbers = range(first, first + lines)
        sys.stdout.write("".join(f"{number:010d} {'x' * 88}\n" for number in numbers))
    sys.stdout.flush()
    print("done", flush=True)
    sleep_forever()


def write_lines(arguments: argparse.Namespace) -> None:
    """Print --bytes in numbered lines of 100 bytes, each with a write of its own, and exit."""
    for number in range(arguments.bytes // 100):
        os.write(1, f"{number:010d} {'x' * 88}\n".encode())


def hold_port(arguments: argparse.Namespace) -> None:
    """Listen on --port and say nothing; SO_REUSEPORT, so that others may listen there, too."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", arguments.port))
        listener.listen()
        print("holding", flush=True)
        sleep_forever()


def crash_after(arguments: argparse.Namespace) -> None:
    """Serve like `ok`, and abort after --seconds."""
    threading.Timer(arguments.seconds, os.kill, (os.getpid(), signal.SIGABRT)).start()
    serve(arguments.port)


def hang(arguments: argparse.Namespace) -> None:
    """Stop itself, as with SIGSTOP: alive, and deaf to SIGTERM until somebody sends SIGCONT."""
    print("stopping", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    sleep_forever()


def spin(arguments: argparse.Namespace) -> None:
    """Use the CPU and do nothing."""
    print("spinning", flush=True)
    while True:
        pass


def fill_memory(arguments: argparse.Namespace) -> None:
    """Fill memory a little at a time, up to 50 MB."""
    hoard = []
    while True:
        hoard.append(bytearray(256 * 1024))
        time.sleep(0.02)
        del hoard[200:]


def serve(port: int, *, loading_s: float = 0.0) -> NoReturn:
    ready_at = time.monotonic() + loading_s

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if time.monotonic() < ready_at:
                body, status = b'{"error":{"message":"Loading model","code":503}}', 503
            else:
                body, status = b'{"status":"ok"}', 200
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Health) as server:
        print(f"listening on {port}", flush=True)
        server.serve_forever()
    sys.exit(0)


MODES: dict[str, Callable[[argparse.Namespace], None]] = {
    "ok": ok,
    "never-ready": never_ready,
    "ignore-sigterm": ignore_sigterm,
    "fork-grandchildren": fork_grandchildren,
    "exit-at-once": exit_at_once,
    "flood": flood,
    "write-lines": write_lines,
    "hold-port": hold_port,
    "crash-after": crash_after,
    "hang": hang,
    "spin": spin,
    "fill-memory": fill_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--code", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=100 * 1024 * 1024)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--slow-start", type=float, default=0.0)
    parser.add_argument("--count", type=Path)
    arguments = parser.parse_args()
    if arguments.count is not None:
        with arguments.count.open("a") as file:
            file.write(f"{os.getpid()}\n")
    MODES[arguments.mode](arguments)


if __name__ == "__main__":
    main()
