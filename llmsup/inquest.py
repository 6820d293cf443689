"""What is known of a process at its death: gathered while it lives, told when the next step is.

Nothing is written here, and what costs time is left to whoever is told: a death is answered first.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llmsup.attendance import Unit
from llmsup.core.advice import next_step
from llmsup.core.diagnosis import OomKills, may_be_oom_kill
from llmsup.core.service import Death, Service, State
from llmsup.host import cgroup, logfile, procfs
from llmsup.host.cgroup import GroupMemory
from llmsup.host.process import ExitStatus
from llmsup.services.launch import Launch

FIRST_SAMPLE_S = 1.0
SAMPLE_PERIOD_S = 5.0
"""What the kernel killed more than two of these before a death is not the cause of it."""


@dataclass(frozen=True)
class Sample:
    """The memory of a process as it was last looked at, and what the kernel had killed till then.

    `group` is None where no control group counts its memory; a process that has just been started
    does not tell its own yet: 0.
    """

    resident_bytes: int = 0
    group: GroupMemory | None = None
    machine_oom_kills: int = 0


@dataclass(frozen=True)
class Findings:
    """A death with its circumstances.

    `time` is Unix seconds. `launch`, `status` and `lived_s` are None where they are not known or
    there was no process. The output is in the unit's log from `log_start` (None: after the line
    that begins the generation) to `log_end`.
    """

    unit: Unit
    death: Death
    next_step: str
    time: float
    launch: Launch | None
    status: ExitStatus | None
    lived_s: float | None
    log_start: int | None
    log_end: int
    memory: Sample


OnDeath = Callable[[Findings], None]
"""Told of each death, once the actions that follow it have been performed."""


@dataclass
class _Life:
    """One generation, as far as it is known."""

    launch: Launch | None = None
    pid: int | None = None
    born_at: float = 0.0
    log_start: int | None = 0
    log_end: int = 0
    status: ExitStatus | None = None
    older: Sample = Sample()
    memory: Sample = Sample()


class Inquest:
    """Looks into the deaths of one service; used from one event loop."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._life = _Life()
        self._counted: tuple[Death, float] | None = None

    def take(self, unit: Unit) -> None:
        """The next process is one of another `unit` of the same service."""
        self._unit = unit

    def note_launch(self, launch: Launch | None) -> None:
        """A generation begins. None: its launch is not known, or cannot be made up."""
        size = logfile.size_bytes(self._unit.log)
        self._life = _Life(launch, log_start=size, log_end=size)

    def note_process(self, pid: int, log_start: int | None) -> None:
        """It is there. None: it is adopted, and where its output begins is not known."""
        life = self._life
        life.pid = pid
        life.born_at = time.monotonic() - (procfs.age_s(pid) if log_start is None else 0.0)
        life.log_start = log_start
        now = _look(pid)
        life.older = life.memory = now if log_start is None else replace(now, resident_bytes=0)

    async def keep_looking(self) -> None:
        """Look at the memory of the process from time to time, until cancelled."""
        pause_s = FIRST_SAMPLE_S
        while self._life.pid is not None:
            await asyncio.sleep(pause_s)
            self._life.older, self._life.memory = self._life.memory, _look(self._life.pid)
            pause_s = SAMPLE_PERIOD_S

    def note_exit(self, status: ExitStatus) -> OomKills:
        """The process has ended; returns what the kernel killed for memory shortly before."""
        life = self._life
        life.status = status
        life.log_end = logfile.size_bytes(self._unit.log)
        if not may_be_oom_kill(status.code, status.signal):
            return OomKills()
        machine = procfs.oom_kills() - life.older.machine_oom_kills
        before = life.older.group
        now = cgroup.memory(Path(before.path)) if before else None
        if before is None or now is None:
            return OomKills(machine=machine)
        return OomKills(now.oom_kills - before.oom_kills, machine, now.max_bytes)

    def follow(self, before: Service, after: Service, now: float) -> Findings | None:
        """What there is to tell of a death, at the step that decides what follows it.

        To be asked at each step, before its actions: a spawn begins the next generation. A stall
        and a hang are counted when they are found, and then the process has to be ended first.
        """
        if after.death is not None and after.death != before.death:
            self._counted = after.death, time.time()
        if self._counted is None or after.state is State.STOPPING:
            return None
        (death, died_time), self._counted = self._counted, None
        life = self._life
        return Findings(
            unit=self._unit,
            death=death,
            next_step=next_step(after, now),
            time=died_time,
            launch=life.launch,
            status=life.status,
            lived_s=None if life.pid is None else death.at - life.born_at,
            log_start=life.log_start,
            log_end=life.log_end,
            memory=life.memory,
        )


def _look(pid: int) -> Sample:
    group = cgroup.memory_group(pid)
    return Sample(
        procfs.resident_bytes(pid), cgroup.memory(group) if group else None, procfs.oom_kills()
    )
