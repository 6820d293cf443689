"""What the kernel tells of a process and its descendants."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llmsup.host import procfs
from llmsup.host.signs import Signs, signs
from tests.home import wait_until

PTRACE_SEIZE = 0x4206
BURN = "end=$(( $(date +%s) + 2 )); while [ $(date +%s) -lt $end ]; do :; done"


@contextmanager
def running(*command: str) -> Iterator[int]:
    """A process in a group of its own, which is killed at the end."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def sleeping_child(pid: int) -> int:
    """The child that sleeps, once there is one."""

    def found() -> list[int]:
        return [it for it in procfs.descendants(pid)[1:] if "sleep" in procfs.command(it)]

    wait_until(lambda: bool(found()), "a sleeping child")
    return found()[0]


def test_one_that_sleeps_shows_no_movement() -> None:
    with running("sh", "-c", "sleep 3600; :") as pid:
        sleeping_child(pid)
        before = signs(pid)
        time.sleep(0.3)
        after = signs(pid)
    assert after == before
    assert not after.is_stopped
    assert not after.is_traced


def test_the_work_of_children_counts_even_when_they_have_ended() -> None:
    with running("sh", "-c", f"sh -c '{BURN}'; sleep 3600; :") as pid:
        wait_until(lambda: signs(pid).cpu_s > 0.1, "the child's work")
        seen_s = signs(pid).cpu_s
        sleeping_child(pid)
        assert signs(pid).cpu_s >= seen_s


def test_one_that_is_stopped_is_seen_to_be() -> None:
    with running("sleep", "3600") as pid:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: signs(pid).is_stopped, "the stop")
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not signs(pid).is_stopped, "the end of the stop")


def test_one_with_a_child_under_a_debugger_is_seen_to_be() -> None:
    with running("sh", "-c", "sleep 3600; :") as pid:
        child = sleeping_child(pid)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(PTRACE_SEIZE, child, None, None) != 0:
            pytest.skip("this kernel lets nobody trace")
        is_traced = signs(pid).is_traced
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # told to its tracer first
    assert is_traced


def test_one_that_has_gone_shows_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert signs(process.pid) == Signs(cpu_s=0.0, faults=0, is_stopped=False, is_traced=False)
