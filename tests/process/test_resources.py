"""The machine runs out of something: it is said, and serving goes on."""

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk import SmallDisk, small_disk
from tests.home import Home, is_alive, wait_until
from tests.process.test_stack import ask, dual


@pytest.fixture(params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    with small_disk(request.param) as mounted:
        yield mounted


@pytest.fixture
def home_on(disk: SmallDisk) -> Iterator[Home]:
    """A home on the small disk, all of it."""
    place = Home(disk.path / "home")
    place.root.mkdir()
    try:
        yield place
    finally:
        place.close()


class Load:
    """Clients that ask in a closed loop; counts what fails."""

    def __init__(self, home: Home, clients: int = 4) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._home = home
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._ends.is_set():
            try:
                ask(self._home)
                self.answered += 1
            except Exception as error:
                self.failures.append(repr(error))

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.answered > 10, "answers")
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(30)


def warnings(home: Home) -> list[str]:
    result = home.cli("status")
    assert result.returncode in {0, 1}, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith("warning: ")]


def test_a_full_disk_stops_no_failover(disk: SmallDisk, home_on: Home) -> None:
    """Servers die under load, again and again, while nothing can be written: no request fails."""
    home = home_on
    dual(home)
    home.start()
    disk.fill()
    with Load(home) as load:
        for name in ("chat", "code", "chat"):
            old = home.service(name)
            os.kill(old["pid"], signal.SIGKILL)
            new = home.wait_replaced(old)
            assert new["restarts"] >= 1
        wait_until(
            lambda: home.cli("upstreams").stdout.count("chat, code") == 3, "lists in Envoy"
        )  # desired, published, confirmed
    assert load.failures == []
    assert disk.is_full()

    assert any("events are not being written" in line for line in warnings(home))
    wait_until(lambda: any("output of services" in line for line in warnings(home)), "the disk")
    assert home.cli("status").returncode == 0

    disk.free()
    wait_until(lambda: warnings(home) == [], "the end of the trouble")
    replaced = [
        event["service"]
        for event in home.events()
        if event["event"] == "state" and event["before"] == "ready"
    ]
    assert replaced == ["chat", "code", "chat"], "events of the time were kept and then written"
    assert "Traceback" not in home.daemon_log()
    said = home.daemon_log()
    assert said.count("WARNING events are not being written") == 1
    assert said.count("INFO no longer: events are not being written") == 1


def test_a_new_daemon_takes_over_on_a_full_disk(disk: SmallDisk, home_on: Home) -> None:
    """Given a full disk, `restart --daemon` leaves servers and gateway serving."""
    home = home_on
    dual(home)
    home.start()
    before = {each["service"]: each["pid"] for each in home.status()["services"]}
    disk.fill()
    with Load(home) as load:
        result = home.cli("restart", "--daemon")
        assert result.returncode == 0, result.stderr
        wait_until(
            lambda: all(each["state"] == "ready" for each in home.status()["services"]), "adoption"
        )
    assert load.failures == []
    assert {each["service"]: each["pid"] for each in home.status()["services"]} == before


@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
def test_a_disk_that_goes_read_only_stops_nothing(disk: SmallDisk, home_on: Home) -> None:
    """Given a file system that gives up, as ext4 does on errors, no request fails."""
    home = home_on
    dual(home)
    home.start()
    disk.abort()
    with Load(home) as load:
        old = home.service("chat")
        os.kill(old["pid"], signal.SIGKILL)
        new = home.wait_replaced(old)
        wait_until(lambda: len(warnings(home)) >= 5, "the troubles in status")
        assert ask(home)[1]["x-llmsup-service"] == "chat"
    assert load.failures == []
    said = "\n".join(warnings(home))
    for trouble in (
        "events are not being written",
        "what the next daemon needs is not being saved",
        "the output of chat is not kept, until it is restarted",
        "the gateway goes by old files",
    ):
        assert trouble in said
    assert said.count("Read-only file system") == said.count("\n") + 1
    output = Path(f"/proc/{new['pid']}/fd/1").readlink()
    assert output == Path(os.devnull)
    result = home.cli("stop")
    assert result.returncode == 0, result.stderr
    assert home.processes() == []


@contextlib.contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """The process can open nothing for the length of the block."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_that_died_while_there_were_no_descriptors_comes_back(home: Home) -> None:
    """Failed spawns for want of descriptors are no crash loop, and the socket answers again."""
    dual(home, restart={"backoff": "10ms", "max_backoff": "10ms", "max_deaths": 2})
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    chat = home.service("chat")
    with without_descriptors(daemon), Load(home) as load:
        os.kill(chat["pid"], signal.SIGKILL)
        said = home.paths.daemon_log
        wait_until(lambda: said.read_text().count("state=backoff before=starting") >= 3, "retries")
        assert home.cli("status", timeout_s=30).returncode in {0, 1, 4}
    assert load.failures == []
    again = home.wait_replaced(chat)
    assert again["state"] == "ready"
    assert is_alive(daemon)
    wait_until(lambda: warnings(home) == [], "no trouble any more")
    log = home.paths.daemon_log.read_text()
    assert "Traceback" not in log
    assert "the daemon can start and ask nothing: Too many open files" in log


def test_the_daemon_raises_its_limit_of_descriptors(home: Home) -> None:
    dual(home)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        home.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for pid in (home.daemon_pid(), home.service("gateway")["pid"], home.service("chat")["pid"]):
        assert pid is not None
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == min(hard, 65536)


def test_logs_are_rotated_as_the_profile_says(home: Home) -> None:
    """Given a child that writes numbered lines, what is kept is in a row up to the last one."""
    writes = (
        "import itertools, time\n"
        "for number in itertools.count():\n"
        "    print(f'{number:07d}', '.' * 100, flush=True)\n"
        "    time.sleep(0.002 if number % 50 == 0 else 0)\n"
    )
    program = home.root / "writer.py"
    program.write_text(writes)
    home.write(
        home.command("writer", [sys.executable, str(program)], grace_period="1s")
        + '[logs]\nmax_size = "256KiB"\nkeep = 2\n'
    )
    home.start()
    log = home.paths.service_log("writer")
    wait_until(log.with_name(f"{log.name}.2").exists, "two rotations")
    assert home.cli("stop", "writer").returncode == 0
    assert not log.with_name(f"{log.name}.3").exists()
    parts = [log.with_name(f"{log.name}.2"), log.with_name(f"{log.name}.1"), log]
    assert [part.stat().st_size for part in parts[:2]] == [256 * 1024] * 2
    lines = b"".join(part.read_bytes() for part in parts).splitlines()[1:]
    numbers = [int(line[:7]) for line in lines if not line.startswith(b"---")]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
