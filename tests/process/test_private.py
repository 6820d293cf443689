"""What is ours stays ours: modes, owners, links, keys."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llmsup.config.paths import paths
from tests.home import Home, free_ports, stub, wait_until
from tests.process.test_stack import dual

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for other users")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def as_nobody(act: Callable[[], object]) -> str:
    """What the act raised or returned in a child process of user nobody."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def secrets(home: Home) -> list[Path]:
    return [home.paths.state, home.paths.runtime, home.paths.logs]


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_everything_is_private_whatever_the_umask(home: Home, mask: int) -> None:
    keys = home.root / "keys.txt"
    keys.write_text("sk-one\n")
    keys.chmod(0o600)
    (port,) = free_ports(1)
    writes = 'import time; open("state/by-a-child", "w").write(""); print("up"); time.sleep(99)'
    home.write(
        f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\napi_keys_file = "keys.txt"\n'
        + home.command("chat", stub("upstream.py", "--port", port, "--name", "chat"), port=port)
        + home.command("writer", [sys.executable, "-c", writes], cwd=str(home.root))
        + '[route."chat-7b"]\nservices = ["chat"]\n'
    )
    with umask(mask):
        home.start()
    os.kill(home.service("chat")["pid"], 9)
    wait_until(lambda: home.service("chat")["restarts"] == 1, "another generation")
    wait_until((home.paths.state / "by-a-child").exists, "the file of the child")
    seen = []
    for directory in secrets(home):
        for path in (directory, *directory.rglob("*")):
            seen.append(path.name)
            expected = 0o700 if path.is_dir() else 0o600
            assert mode(path) == expected, f"{path} has mode {mode(path):04o}"
    for name in (
        "memory.json", "events.jsonl", "daemon.lock", "daemon.log", "chat.service.log",
        "control.sock", "admin.sock", "routes.json", "chat-7b.json", "by-a-child",
    ):  # fmt: skip
        assert name in seen
    assert mode(home.root) & 0o022 == 0


def test_loose_directories_and_files_are_tightened(home: Home) -> None:
    dual(home)
    for directory in (*secrets(home), home.paths.config):
        directory.mkdir(parents=True)
        directory.chmod(0o777)
    home.root.chmod(0o777)
    for path in (home.paths.events, home.paths.lock, home.paths.service_log("chat")):
        path.write_text("")
        path.chmod(0o666)
    home.start()
    assert [mode(each) for each in secrets(home)] == [0o700] * 3
    assert [mode(each) for each in (home.root, home.paths.config)] == [0o755] * 2
    for path in (home.paths.events, home.paths.lock, home.paths.service_log("chat")):
        assert mode(path) == 0o600


def is_refusal(result: subprocess.CompletedProcess[str], words: str) -> None:
    assert result.returncode in {1, 4}, result.stdout
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")


@as_root
@pytest.mark.parametrize("name", ["", "state", "run", "logs", "config"])
@pytest.mark.parametrize("command", [("start", "test.toml", "--no-wait"), ("status",), ("stop",)])
def test_a_directory_of_somebody_else_is_refused(
    home: Home, name: str, command: tuple[str, ...]
) -> None:
    dual(home)
    place = home.root / name
    place.mkdir(exist_ok=True)
    os.chown(place, NOBODY, NOBODY)
    is_refusal(home.cli(*command), f"{place} belongs to uid {NOBODY}, not to you")
    assert home.daemon_pid() is None


@as_root
def test_a_link_into_the_directory_of_somebody_else_is_refused(home: Home) -> None:
    dual(home)
    theirs = home.root / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    home.paths.runtime.symlink_to(theirs)
    is_refusal(home.cli("start", str(home.profile)), f"belongs to uid {NOBODY}")
    assert list(theirs.iterdir()) == []


@as_root
def test_a_link_that_somebody_else_made_is_refused(home: Home) -> None:
    dual(home)
    ours = home.root / "ours"
    ours.mkdir()
    home.paths.logs.symlink_to(ours)
    os.chown(home.paths.logs, NOBODY, NOBODY, follow_symlinks=False)
    is_refusal(home.cli("start", str(home.profile)), f"belongs to uid {NOBODY}")


def test_a_home_that_is_a_link_of_ours_works(home: Home) -> None:
    dual(home)
    link = home.root / "link"
    (home.root / "real").mkdir()
    link.symlink_to(home.root / "real")
    home.environ["LLMSUP_HOME"] = str(link)
    home.paths = paths(home.environ)
    home.start()
    assert home.cli("stop").returncode == 0


def test_links_in_our_directories_are_not_followed(home: Home) -> None:
    """Given links to a precious file under every name that is written, it stays as it is."""
    dual(home)
    precious = home.root / "precious"
    precious.write_text("precious")
    home.paths.create()
    spares = home.paths.gateway / "tmp"
    spares.mkdir(parents=True)
    names = ("chat-7b.json", "code-7b.json", "routes.json", "clusters.json", "listeners.json")
    links = [
        home.paths.events,
        home.paths.memory,
        home.paths.memory.with_suffix(".spare"),
        home.paths.service_log("chat"),
        home.paths.service_log("gateway"),
        home.paths.control_socket,
        home.paths.control_socket.with_suffix(".new"),
        home.paths.gateway / "bootstrap.json",
        *(spares / name for name in (*names, "bootstrap.json")),
    ]
    for link in links:
        link.symlink_to(precious)
    home.start()
    os.kill(home.service("chat")["pid"], 9)
    wait_until(lambda: home.service("chat")["restarts"] == 1, "another generation")
    home.wait_state("chat", "ready")
    troubles = home.status()["daemon"]["troubles"]
    assert any("events" in each and "it is a symbolic link" in each for each in troubles)
    assert any("output of chat" in each for each in troubles)
    assert precious.read_text() == "precious"
    assert mode(precious) != 0o600
    assert home.cli("stop").returncode == 0
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["state/daemon.lock", "logs/daemon.log"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_a_start_cannot_do_without_is_named(home: Home, name: str, kind: str) -> None:
    dual(home)
    home.paths.create()
    path = home.root / name
    if kind == "link":
        path.symlink_to(home.root / "elsewhere")
    else:
        os.mkfifo(path)
    is_refusal(home.cli("start", str(home.profile), timeout_s=20), str(path))
    path.unlink()
    assert not (home.root / "elsewhere").exists()


def test_a_journal_that_is_a_pipe_blocks_nobody(home: Home) -> None:
    dual(home)
    home.paths.create()
    os.mkfifo(home.paths.events)
    os.mkfifo(home.paths.service_log("chat"))
    home.start()
    assert home.cli("stop").returncode == 0


@as_root
def test_others_cannot_ask_the_daemon(home: Home) -> None:
    """Given a home that others may enter, the control and admin sockets are out of their reach."""
    dual(home)
    home.start()
    home.root.chmod(0o755)
    for path in (home.paths.control_socket, home.paths.gateway / "admin.sock"):

        def connect(path: Path = path) -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))

        assert as_nobody(connect).startswith("PermissionError")
        assert as_nobody(path.lstat).startswith("PermissionError")
    assert as_nobody(lambda: list(home.paths.state.iterdir())).startswith("PermissionError")


@as_root
def test_a_socket_that_somebody_else_serves_is_refused(home: Home) -> None:
    home.paths.create()
    home.root.chmod(0o755)
    home.paths.runtime.chmod(0o777)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(home.paths.control_socket))
        listener.listen(8)
        os.write(writing, b"listening")
        while True:
            listener.accept()
    try:
        assert os.read(reading, 9) == b"listening"
        is_refusal(home.cli("status"), f"is served by uid {NOBODY}, not by you")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@as_root
def test_marks_of_other_users_are_not_believed(home: Home) -> None:
    """A process of somebody else that says it is our chat is neither adopted nor ended."""
    dual(home)
    mark = f"{home.paths.state}:chat:7:"
    pretender = subprocess.Popen(
        ["/bin/sleep", "60"], env={"LLMSUP_MARK": mark}, user=NOBODY, group=NOBODY
    )
    try:
        home.start()
        assert home.service("chat")["generation"] == 1
        assert home.cli("stop").returncode == 0
        assert pretender.poll() is None
    finally:
        pretender.kill()
        pretender.wait(10)


def test_keys_are_nowhere_to_be_seen(home: Home) -> None:
    """Given a used key and a wrong one, no log, no state, no command line has either."""
    right, wrong = "sk-right-4711", "sk-wrong-0815"
    keys = home.root / "keys.txt"
    keys.write_text(right + "\n")
    keys.chmod(0o600)
    (port,) = free_ports(1)
    home.write(
        f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\napi_keys_file = "keys.txt"\n'
        + home.command("chat", stub("upstream.py", "--port", port, "--name", "chat"), port=port)
        + '[route."chat-7b"]\nservices = ["chat"]\n'
    )
    home.environ["LLMSUP_LOG"] = "debug"
    home.start()
    url = f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions"
    body = {"model": "chat-7b", "messages": []}
    answers = []
    for header, key, status in (
        ("x-api-key", right, 200),
        ("authorization", f"Bearer {right}", 200),
        ("x-api-key", wrong, 401),
        ("authorization", f"Bearer {wrong}", 401),
    ):
        answer = httpx.post(url, json=body, headers={header: key}, timeout=20)
        assert answer.status_code == status
        answers.append(answer.text)
    os.kill(home.service("chat")["pid"], 9)
    wait_until(lambda: home.service("chat")["restarts"] == 1, "another generation")
    shown = [
        result.stdout + result.stderr
        for result in (
            home.cli("status"), home.cli("status", "--json"), home.cli("events", "--json"),
            home.cli("logs", "daemon"), home.cli("logs", "gateway"), home.cli("upstreams"),
            home.cli("profile", "show", str(home.profile)),
        )
    ]  # fmt: skip
    told = {f"output {n}": text.encode() for n, text in enumerate([*shown, *answers])}
    for pid in [home.daemon_pid(), *home.processes()]:
        for file in ("cmdline", "environ"):
            told[f"{file} of {pid}"] = Path(f"/proc/{pid}/{file}").read_bytes()
    routes = home.paths.gateway / "xds" / "routes.json"
    private = {keys, routes, home.paths.gateway / "tmp" / "routes.json"}
    assert right in routes.read_text(), "the one place where Envoy is told"
    for path in home.root.rglob("*"):
        if path.is_file() and path not in private:
            told[str(path)] = path.read_bytes()
    assert len(told) > 20
    assert [where for where, text in told.items() if b"4711" in text or b"0815" in text] == []
