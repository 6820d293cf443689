"""Memory figures of control groups, as each kind of mount lays them out."""

import os
from pathlib import Path

import pytest

from llmsup.host import cgroup, procfs


def version_2(directory: Path, limit: str = "max") -> None:
    directory.mkdir(parents=True)
    (directory / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 2\noom_kill 5\n")
    (directory / "memory.current").write_text("4096\n")
    (directory / "memory.max").write_text(f"{limit}\n")


def version_1(directory: Path, limit: int = 9223372036854771712) -> None:
    directory.mkdir(parents=True)
    (directory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    (directory / "memory.usage_in_bytes").write_text("8192\n")
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")


def said_of(monkeypatch: pytest.MonkeyPatch, proc: Path, text: str) -> None:
    (proc / "42").mkdir(parents=True)
    (proc / "42/cgroup").write_text(text)
    monkeypatch.setattr(procfs, "PROC", proc)


def test_version_2_as_under_a_systemd_user_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "user.slice/user-1000.slice/user@1000.service/app.slice/llmsup.service"
    version_2(tmp_path / path, "3221225472")
    said_of(monkeypatch, tmp_path / "proc", f"0::/{path}\n")
    group = cgroup.memory_group(42, tmp_path)
    assert group == tmp_path / path
    assert cgroup.memory(group) == cgroup.GroupMemory(str(group), 4096, 3 * 2**30, 5)


def test_version_1_beside_version_2_counts_in_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version_1(tmp_path / "memory/llm:1")
    (tmp_path / "unified").mkdir()
    text = "9:name=systemd:/\n4:cpu,memory:/llm:1\n1:cpuset:/\n0::/\n"
    said_of(monkeypatch, tmp_path / "proc", text)
    group = cgroup.memory_group(42, tmp_path)
    assert group == tmp_path / "memory/llm:1"
    assert cgroup.memory(group) == cgroup.GroupMemory(str(group), 8192, None, 7)


@pytest.mark.parametrize("text", ["", "0::/\n", "nonsense\n", "4:memory:/gone\n0::/gone\n"])
def test_where_nothing_is_counted_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    said_of(monkeypatch, tmp_path / "proc", text)
    assert cgroup.memory_group(42, tmp_path) is None
    assert cgroup.memory_group(43, tmp_path) is None, "a process that has gone"
    assert cgroup.memory(tmp_path) is None


def test_the_kernel_tells_the_same_of_this_very_process() -> None:
    total_bytes, available_bytes = procfs.machine_memory()
    assert 0 < available_bytes <= total_bytes
    assert 1 << 20 < procfs.resident_bytes(os.getpid()) < total_bytes
    assert procfs.counter(Path("/proc/vmstat"), "pgfault") > 0
    assert procfs.oom_kills() >= 0
    assert procfs.counter(Path("/proc/vmstat"), "nothing_of_the_kind") == 0
