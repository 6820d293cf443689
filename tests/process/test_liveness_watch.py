"""What a watch asks of a process that shows no sign of life, and what it makes of the answers."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmsup.config.schema import Liveness
from llmsup.core.liveness import period_s
from llmsup.host import ports
from llmsup.liveness_watch import LivenessWatch
from llmsup.services.launch import Launch, Target, Via
from tests.home import wait_until

POLICY = Liveness(timeout_s=2.0)
LOOKS = 8

Answers = dict[str, tuple[int, str] | None]
"""Status and body by path; None is accepted and never answered."""

HEALTHY = (200, "")
NOT_THERE = (501, "")
IDLE_METRICS = (200, "llamacpp:requests_processing 0\nllamacpp:n_decode_total 7\n")
BUSY_METRICS = (200, "llamacpp:requests_processing 2\nllamacpp:n_decode_total 7\n")
BUSY_SLOTS = (200, json.dumps([{"id": 0, "is_processing": True, "id_task": 1}]))
NONSENSE = (200, "what?")


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that does nothing at all."""
    with subprocess.Popen(["sleep", "3600"]) as process:
        yield process.pid
        process.kill()


def watched(
    pid: int, answers: Answers, *, via: Via = Via.HTTP, is_gpu_busy: bool | None = None
) -> tuple[str, list[str]]:
    """The verdict after some looks at `pid`, and the paths it was asked for on the way."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        asked.append(path)
        if (said := answers.get(path)) is not None:
            status, body = said
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode())
            writer.write(body.encode())
            await writer.drain()
        else:
            await reader.read()
        writer.close()

    async def run() -> str:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            launch = Launch(("x",), Target(via, port=port, path="/health"), tells_work=True)
            return await verdict(pid, launch, is_gpu_busy=is_gpu_busy)

    return asyncio.run(run()), asked


async def verdict(pid: int, launch: Launch, *, is_gpu_busy: bool | None = None) -> str:
    watch = LivenessWatch(POLICY, pid, launch, lambda: is_gpu_busy)
    for _ in range(LOOKS):
        if reason := await watch.look():
            return reason
        await asyncio.sleep(period_s(POLICY))
    return ""


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (
            {"/health": HEALTHY, "/metrics": BUSY_METRICS, "/slots": BUSY_SLOTS},
            "says it is healthy but decoded nothing",
        ),
        (
            {"/health": HEALTHY, "/metrics": NOT_THERE, "/slots": BUSY_SLOTS},
            "says it is healthy but decoded nothing",
        ),
        (
            {"/health": HEALTHY, "/metrics": BUSY_METRICS, "/slots": NOT_THERE},
            "says it is healthy but decoded nothing",
        ),
        ({"/health": HEALTHY, "/metrics": None}, "says it is healthy but did not tell"),
        ({"/health": None, "/metrics": None}, "answered nothing"),
        ({"/health": None, "/metrics": NOT_THERE, "/slots": NOT_THERE}, "answered nothing"),
    ],
)
def test_it_is_hung_when_it_has_work_or_is_silent(
    sleeper: int, answers: Answers, says: str
) -> None:
    reason, _ = watched(sleeper, answers)
    assert reason.startswith(says)


@pytest.mark.parametrize(
    "answers",
    [
        {"/health": HEALTHY, "/metrics": IDLE_METRICS},
        {"/health": HEALTHY, "/metrics": NOT_THERE, "/slots": NOT_THERE},
        {"/health": (503, ""), "/metrics": NOT_THERE, "/slots": NOT_THERE},
        {"/health": HEALTHY, "/metrics": NONSENSE},
    ],
)
def test_it_is_not_hung_when_it_answers_and_has_no_work_that_is_known(
    sleeper: int, answers: Answers
) -> None:
    reason, _ = watched(sleeper, answers)
    assert reason == ""


def test_slots_are_not_asked_for_while_nothing_is_pending(sleeper: int) -> None:
    """Asking for them would wake a server that sleeps, and keep it awake."""
    _, asked = watched(sleeper, {"/health": HEALTHY, "/metrics": IDLE_METRICS})
    assert "/metrics" in asked
    assert "/slots" not in asked


def test_nothing_is_asked_of_a_process_that_works() -> None:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy:
        reason, asked = watched(busy.pid, {})
        busy.kill()
    assert (reason, asked) == ("", [])


def test_nothing_is_asked_while_the_card_works(sleeper: int) -> None:
    assert watched(sleeper, {}, is_gpu_busy=True) == ("", [])


def test_a_refused_connection_is_no_hang(sleeper: int) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = Target(Via.HTTP, port=unused.getsockname()[1])
        for tells_work in (False, True):
            launch = Launch(("x",), target, tells_work=tells_work)
            assert asyncio.run(verdict(sleeper, launch)) == ""


def test_that_a_connection_is_accepted_is_no_answer_and_no_silence(sleeper: int) -> None:
    answers: Answers = {"/metrics": NOT_THERE, "/slots": NOT_THERE}
    assert watched(sleeper, answers, via=Via.TCP)[0] == ""


@pytest.mark.parametrize(("may_wait", "says"), [(True, ""), (False, "answered nothing for ")])
def test_a_silent_program_that_waits_for_somebody_else_is_no_hang(
    may_wait: bool, says: str
) -> None:
    """Given a connection of its own that nobody answers on, as a client of a model has."""
    program = (
        "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).recv(1)"
    )
    with socket.socket() as model, socket.socket() as mute:
        for listener in (model, mute):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        argv = [sys.executable, "-c", program, str(model.getsockname()[1])]
        with subprocess.Popen(argv) as process:
            try:
                wait_until(lambda: ports.have_asked([process.pid]), "a connection")
                target = Target(Via.HTTP, port=mute.getsockname()[1], path="/health")
                launch = Launch(("x",), target, may_wait=may_wait)
                reason = asyncio.run(verdict(process.pid, launch))
                assert reason.startswith(says)
                assert bool(reason) is not may_wait
            finally:
                process.kill()
