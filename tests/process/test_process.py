import asyncio
import os
import resource
import signal
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmsup.errors import LaunchError
from llmsup.host import procfs
from llmsup.host.process import ExitStatus, Process, end_marked, marked
from llmsup.services.launch import Launch, Target, Via

CHILDREN = Path(__file__).parent.parent / "stubs" / "children.py"


@dataclass(frozen=True)
class Child:
    """A spawned process, its end, and its words."""

    process: Process
    exited: "asyncio.Future[ExitStatus]"
    log: Path
    mark: str

    @property
    def pid(self) -> int:
        return self.process.pid

    async def end(self) -> ExitStatus:
        return await asyncio.wait_for(asyncio.shield(self.exited), 10)

    async def wait_said(self, words: str) -> str:
        await until(lambda: words in self.log.read_text())
        return self.log.read_text()


def launch_of(*argv: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Launch:
    return Launch(argv=argv, target=Target(Via.ALIVE), env=env or {}, cwd=cwd)


def stub(*arguments: str) -> Launch:
    return launch_of(sys.executable, str(CHILDREN), *arguments)


@asynccontextmanager
async def started(launch: Launch, tmp_path: Path, mark: str = "") -> AsyncIterator[Child]:
    mark = mark or f"test:{uuid.uuid4()}:"
    log = tmp_path / f"{uuid.uuid4()}.log"
    process = Process.spawn(launch, log=log, mark=mark)
    exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
    process.watch(exited.set_result)  # a second call would raise InvalidStateError
    child = Child(process, exited, log, mark)
    try:
        yield child
    finally:
        process.kill()
        await child.end()
        await asyncio.to_thread(end_marked, mark, 0)


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def is_there(pid: int) -> bool:
    return procfs.read(pid, "cmdline") != b""


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# --- the end of a process


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("exit 0", "exited with status 0"),
        ("exit 3", "exited with status 3"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("kill -TERM $$", "killed by SIGTERM"),
        ("kill -40 $$", "killed by signal 40"),
    ],
)
def test_exit_is_seen_once_and_named(program: str, reason: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(launch_of("sh", "-c", program), tmp_path) as child:
            status = await child.end()

            assert status.reason == reason
            assert status.clean == (program == "exit 0")
            assert not (procfs.PROC / str(child.pid)).exists(), "a zombie was left"

    asyncio.run(scenario())


def test_reasons_for_people() -> None:
    assert ExitStatus(signal=signal.SIGSEGV, dumped_core=True).reason == (
        "killed by SIGSEGV (core dumped)"
    )
    assert ExitStatus().reason.startswith("ended; its exit status is not known")


def test_exit_before_the_watch_is_seen_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = Process.spawn(launch_of("true"), log=tmp_path / "log", mark="test:")
        await until(lambda: not is_there(process.pid))
        exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        process.watch(exited.set_result)

        assert await asyncio.wait_for(exited, 5) == ExitStatus(code=0)

    asyncio.run(scenario())


def test_death_of_the_leader_takes_its_group_along(tmp_path: Path) -> None:
    """Given a grandchild that ignores SIGTERM, when the child dies, then the grandchild is killed;
    one that left for a session of its own is found by its mark."""

    async def scenario() -> None:
        async with started(stub("fork-grandchildren"), tmp_path) as child:
            near, far = map(int, (await child.wait_said("\n")).split())
            await until(lambda: {child.pid, near, far} == set(marked(child.mark)))
            os.kill(child.pid, signal.SIGKILL)
            await child.end()

            await until(lambda: marked(child.mark) == [far])
            assert await asyncio.to_thread(end_marked, child.mark, 0.05) == 1
            assert marked(child.mark) == []
            assert not is_there(near)
            assert not is_there(far)

    asyncio.run(scenario())


def test_terminate_ends_a_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(stub("ok"), tmp_path) as child:
            await child.wait_said("listening")
            child.process.terminate()

            assert await child.end() == ExitStatus(signal=signal.SIGTERM)

    asyncio.run(scenario())


def test_terminate_wakes_a_stopped_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(stub("hang"), tmp_path) as child:
            await until(lambda: b"\nState:\tT" in procfs.read(child.pid, "status"))
            child.process.terminate()

            assert await child.end() == ExitStatus(signal=signal.SIGTERM)

    asyncio.run(scenario())


def test_kill_ends_what_ignores_terminate(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(stub("ignore-sigterm"), tmp_path) as child:
            await child.wait_said("ignoring")
            child.process.terminate()
            child.process.kill()

            assert await child.end() == ExitStatus(signal=signal.SIGKILL)

    asyncio.run(scenario())


def test_nothing_is_signalled_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with started(launch_of("true"), tmp_path) as child:
            await child.end()
            signalled: list[int] = []
            monkeypatch.setattr(os, "killpg", lambda group, _: signalled.append(group))
            child.process.terminate()
            child.process.kill()

            assert signalled == []

    asyncio.run(scenario())


# --- spawning


def test_a_child_starts_with_a_clean_slate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("GGML_CUDA_ENABLE_UNIFIED_MEMORY", "1")
    monkeypatch.setenv("FROM_OUTSIDE", "kept")
    launch = launch_of("sleep", "60", env={"LLAMA_ARG_HOST": "::1", "EMPTY": ""}, cwd=tmp_path)

    async def scenario() -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            async with started(launch, tmp_path) as child:
                await until(lambda: procfs.command(child.pid) == "sleep 60")
                await until(lambda: b"\nState:\tS" in procfs.read(child.pid, "status"))
                environ = procfs.environ(child.pid)
                assert b"LLAMA_ARG_CTX_SIZE" not in environ
                assert b"LLAMA_API_KEY" not in environ
                assert b"GGML_CUDA_ENABLE_UNIFIED_MEMORY" not in environ
                assert environ[b"FROM_OUTSIDE"] == b"kept"
                assert environ[b"LLAMA_ARG_HOST"] == b"::1"
                assert environ[b"EMPTY"] == b""
                assert environ[b"LLMSUP_MARK"] == child.mark.encode()

                assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
                links = procfs.PROC / str(child.pid)
                files = {file.name: str(file.readlink()) for file in (links / "fd").iterdir()}
                log = str(child.log)
                assert files == {"0": "/dev/null", "1": log, "2": log}
                assert (links / "cwd").readlink() == tmp_path

                status = dict(
                    line.split(":\t", 1)
                    for line in (links / "status").read_text().splitlines()
                    if line.startswith("Sig")
                )
                assert int(status["SigBlk"], 16) == 0
                assert int(status["SigIgn"], 16) & 1 << signal.SIGPIPE - 1 == 0
            assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    asyncio.run(scenario())


def test_output_is_appended_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")

    async def scenario() -> None:
        process = Process.spawn(
            launch_of("sh", "-c", "echo out; echo err >&2"), log=log, mark="test:"
        )
        exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        process.watch(exited.set_result)
        await asyncio.wait_for(exited, 5)

    asyncio.run(scenario())

    assert log.read_text() == "before\nout\nerr\n"


def unstartable(tmp_path: Path) -> dict[str, Launch]:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x7fELF and nothing more")
    garbage.chmod(0o755)
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/nowhere/python\n")
    orphan.chmod(0o755)
    return {
        "missing": launch_of(str(tmp_path / "missing")),
        "missing on PATH": launch_of("llmsup-no-such-program"),
        "not executable": launch_of(str(plain)),
        "not a program": launch_of(str(garbage)),
        "no interpreter": launch_of(str(orphan)),
        "a directory": launch_of(str(tmp_path)),
        "no cwd": launch_of("true", cwd=tmp_path / "missing"),
        "a NUL in an argument": launch_of("true", "a\0b"),
        "an impossible variable": launch_of("true", env={"A=B": "c"}),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "missing on PATH",
        "not executable",
        "not a program",
        "no interpreter",
        "a directory",
        "no cwd",
        "a NUL in an argument",
        "an impossible variable",
    ],
)
def test_what_can_never_start_is_a_permanent_failure(case: str, tmp_path: Path) -> None:
    launch = unstartable(tmp_path)[case]
    with pytest.raises(LaunchError) as caught:
        Process.spawn(launch, log=tmp_path / "log", mark="test:")

    assert caught.value.permanent
    assert caught.value.message.startswith(f"cannot start {launch.argv[0]}")
    assert "\n" not in caught.value.message
    assert ("in " + str(launch.cwd) in caught.value.message) == (case == "no cwd")


def test_a_log_that_cannot_be_opened_keeps_nobody_from_starting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "directory").mkdir()
    for log in ("missing/log", "pipe", "link", "directory"):

        async def scenario(log: Path = tmp_path / log) -> None:
            process = Process.spawn(launch_of("echo"), log=log, mark="test:")
            exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
            process.watch(exited.set_result)
            assert (await asyncio.wait_for(exited, 5)).clean

        asyncio.run(scenario())
    assert not (tmp_path / "elsewhere").exists()


def test_no_descriptor_left_is_a_passing_failure(tmp_path: Path) -> None:
    """At each descriptor that a spawn needs: no leak, no child, and worth another try."""
    before = descriptors()
    failures: list[LaunchError] = []

    async def scenario() -> None:
        lowest_free = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest_free)
        for spare in range(8):
            with limited(resource.RLIMIT_NOFILE, lowest_free + spare):
                try:
                    process = Process.spawn(launch_of("true"), log=tmp_path / "log", mark="test:")
                except LaunchError as error:
                    failures.append(error)
                    continue
            exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
            process.watch(exited.set_result)
            await asyncio.wait_for(exited, 5)

    asyncio.run(scenario())

    assert failures
    assert not any(error.permanent for error in failures)
    assert all(error.shortage for error in failures)
    assert all(error.hint for error in failures)
    assert descriptors() == before


def test_fifty_spawns_leave_no_descriptor(tmp_path: Path) -> None:
    async def scenario() -> None:
        before = descriptors()
        for _ in range(50):
            async with started(launch_of("true"), tmp_path) as child:
                await child.end()
            with pytest.raises(LaunchError):
                Process.spawn(launch_of("/missing"), log=tmp_path / "log", mark="test:")

        assert descriptors() == before

    asyncio.run(scenario())


def test_spawning_takes_milliseconds(tmp_path: Path) -> None:
    async def scenario() -> None:
        taken_s = []
        for _ in range(11):
            begun_at = time.perf_counter()
            async with started(launch_of("true"), tmp_path) as child:
                taken_s.append(time.perf_counter() - begun_at)
                await child.end()

        assert statistics.median(taken_s) < 0.05

    asyncio.run(scenario())


# --- progress


async def settled(process: Process) -> None:
    """Until the process has made no progress for a while."""
    deadline = time.monotonic() + 20
    last = process.progress()
    same = 0
    while same < 10:
        assert time.monotonic() < deadline, "the process goes on making progress"
        await asyncio.sleep(0.02)
        now = process.progress()
        assert now >= last
        same = same + 1 if now == last else 0
        last = now


@pytest.mark.parametrize("mode", ["spin", "hang", "never-ready"])
def test_a_process_that_gets_nowhere_makes_no_progress(mode: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(stub(mode), tmp_path) as child:
            await child.wait_said("ing")
            await settled(child.process)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "launch",
    [
        stub("fill-memory"),
        launch_of("sh", "-c", f"{sys.executable} {CHILDREN} fill-memory; true"),
        launch_of("sh", "-c", "while sleep 0.01; do echo loading; done"),
        launch_of("sh", "-c", "head -c 200000000 /dev/zero > /dev/null; sleep 60"),
    ],
    ids=["memory", "memory of a grandchild", "output", "reading"],
)
def test_progress_grows_with_what_is_done(launch: Launch, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(launch, tmp_path) as child:
            last = child.process.progress()
            await until(lambda: child.process.progress() > last + 10)

    asyncio.run(scenario())


# --- leftovers


def test_end_marked_ends_those_with_the_prefix_and_nobody_else(tmp_path: Path) -> None:
    """Given a polite, a stubborn and a stopped process of one home and one of another, when the
    home's are ended, then the polite ones got a SIGTERM and the stubborn one a SIGKILL."""
    home = f"test:{uuid.uuid4()}:"

    async def scenario() -> None:
        async with (
            started(stub("ok"), tmp_path, f"{home}chat:1:") as polite,
            started(stub("ignore-sigterm"), tmp_path, f"{home}code:1:") as stubborn,
            started(stub("hang"), tmp_path, f"{home}rag:1:") as stopped,
            started(stub("ok"), tmp_path) as other,
        ):
            await polite.wait_said("listening")
            await stubborn.wait_said("ignoring")
            await until(lambda: b"\nState:\tT" in procfs.read(stopped.pid, "status"))
            mine = [polite.pid, stubborn.pid, stopped.pid]
            assert sorted(marked(home)) == sorted(mine)
            assert marked(f"{home}chat:") == [polite.pid]

            assert await asyncio.to_thread(end_marked, home, 0.3, are_watched=True) == 3
            assert await polite.end() == ExitStatus(signal=signal.SIGTERM)
            assert await stubborn.end() == ExitStatus(signal=signal.SIGKILL)
            assert await stopped.end() == ExitStatus(signal=signal.SIGTERM)
            assert not other.exited.done()
            assert marked(home) == []

    asyncio.run(scenario())


def test_end_marked_does_not_wait_for_nobody() -> None:
    begun_at = time.monotonic()

    assert end_marked(f"test:{uuid.uuid4()}:", 30) == 0
    assert time.monotonic() - begun_at < 5
