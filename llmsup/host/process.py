"""One child process: started in its own session, watched through a pidfd, ended as a group."""

import asyncio
import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmsup.errors import LaunchError
from llmsup.host import logfile, notify, procfs
from llmsup.services.launch import Launch

MARK = "LLMSUP_MARK"
"""The variable by which the children of a home are found again, even those that left the group."""

DIGEST = "LLMSUP_LAUNCH"
"""The variable with the digest of the launch: what a process was started as, told by itself."""

GRANT = "LLMSUP_GRANT"
"""The variable with what it was given of the card."""

# Settings of llama-server that would act behind the profile's back: an inherited API key makes it
# refuse what the gateway forwards while its /health stays good; unified memory hides that a card is
# full, and is slow instead. And what lets the daemon, and nobody in its name, speak to the service
# manager.
_SCRUBBED = (
    *("LLAMA_ARG_", "LLAMA_SERVER_", "LLAMA_API_KEY", "GGML_CUDA_ENABLE_UNIFIED_MEMORY"),
    *notify.VARIABLES,
)
_PASSING_ERRNOS = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO}
    | {errno.EDQUOT, errno.EROFS, errno.ESTALE}
    | {errno.EINTR, errno.ETXTBSY}
)
_SHORTAGES = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: an exit code, or the signal that killed it."""

    code: int | None = None
    signal: int | None = None
    dumped_core: bool = False

    @property
    def clean(self) -> bool:
        """Whether it exited with status 0."""
        return self.code == 0

    @property
    def signal_name(self) -> str | None:
        """ "SIGKILL"; None where no signal killed it, or that is not known."""
        return None if self.signal is None else _name(self.signal)

    @property
    def reason(self) -> str:
        """The end in words: "exited with status 1", "killed by SIGSEGV (core dumped)"."""
        if self.signal is not None:
            return f"killed by {self.signal_name}" + " (core dumped)" * self.dumped_core
        if self.code is not None:
            return f"exited with status {self.code}"
        return "ended; its exit status is not known, since an earlier daemon had started it"


class Process:
    """A process of ours and its group, used from one event loop. `pidfd` is its for good."""

    def __init__(self, pid: int, pidfd: int, log: Path) -> None:
        self.pid = pid
        self._log = log
        self._pidfd = pidfd
        self._has_ended = False
        self._log_seen_bytes = 0
        self._work_seen: dict[int, int] = {}
        self._progress = 0

    @classmethod
    def spawn(cls, launch: Launch, *, log: Path, mark: str) -> "Process":
        """Start `launch` in a session of its own, its output appended to `log` if that can be.

        Raises LaunchError, permanent where trying again without a change is useless.
        """
        try:
            output = logfile.open_output(log)
        except OSError as error:
            raise _launch_error(f"cannot write {log}", error) from None
        try:
            with _no_signal_blocked():
                popen = subprocess.Popen(
                    (*launch.argv, *launch.once),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=launch.cwd,
                    env={**inherited(), **launch.env, **_told(launch, mark)},
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            where = f" in {launch.cwd}" if launch.cwd and not launch.cwd.is_dir() else ""
            raise _launch_error(f"cannot start {launch.argv[0]}{where}", error) from None
        finally:
            os.close(output)
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError as error:
            popen.kill()
            popen.wait()
            raise _launch_error(f"cannot watch {launch.argv[0]}", error) from None
        popen.returncode = 0  # it is reaped through its pidfd, in `_note_end`
        return cls(popen.pid, pidfd, log)

    @classmethod
    def adopt(cls, pid: int, *, log: Path, mark: str) -> "Process | None":
        """The live process `pid` that an earlier daemon started with this mark; None without it."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        # Looked at once the pidfd holds it: before that the pid could have been recycled.
        if not carries_mark(pid, mark) or _is_readable(pidfd):
            os.close(pidfd)
            return None
        return cls(pid, pidfd, log)

    def watch(self, on_exit: Callable[[ExitStatus], None]) -> None:
        """Call `on_exit` once, from the running loop, when the process has ended and is reaped."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._note_end, loop, on_exit)

    def disown(self) -> None:
        """Stop watching, and leave the process to the next daemon."""
        asyncio.get_running_loop().remove_reader(self._pidfd)

    def terminate(self) -> None:
        """SIGTERM to the group, and SIGCONT: a stopped process cannot end. No-op after the end."""
        self._signal_group(signal.SIGTERM, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the group. No-op after the end."""
        self._signal_group(signal.SIGKILL)

    def progress(self) -> int:
        """A number that grows between two calls if the process or a descendant did something.

        Counted: output to the log, bytes read, pages read in, memory filled. Not: CPU time.
        """
        with suppress(OSError):
            size = self._log.stat().st_size
            self._progress += max(0, size - self._log_seen_bytes)  # a rotated log is smaller
            self._log_seen_bytes = size
        work = {pid: procfs.work_done(pid) for pid in procfs.descendants(self.pid)}
        self._progress += sum(
            max(0, done - self._work_seen.get(pid, 0)) for pid, done in work.items()
        )
        self._work_seen = work
        return self._progress

    def _signal_group(self, *signals: signal.Signals) -> None:
        # A child that has ended pins the number of its group until it is reaped. One that was
        # adopted is reaped by init, and then the number may be a stranger's.
        if self._has_ended or (_is_readable(self._pidfd) and _status(self._pidfd) is None):
            return
        for number in signals:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _note_end(
        self, loop: asyncio.AbstractEventLoop, on_exit: Callable[[ExitStatus], None]
    ) -> None:
        loop.remove_reader(self._pidfd)
        status = _status(self._pidfd)
        # In this order: what is left of the group is killed while the zombie of the leader still
        # pins the group's number, and only then is the leader reaped.
        self.kill()
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        self._has_ended = True
        os.close(self._pidfd)
        on_exit(status or ExitStatus())


@dataclass(frozen=True)
class Found:
    """A process of one generation of a service, which a daemon of this home started."""

    pid: int
    mark: str
    service: str
    generation: int
    digest: str
    grant: str
    is_leader: bool
    start_ticks: int


def reap() -> None:
    """Reap what has ended before anything was watched: children of the daemon we were before."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def find(prefix: str) -> list[Found]:
    """The processes of all generations whose mark is `prefix` + "SERVICE:GENERATION:"."""
    found = []
    for pid in marked(prefix):
        mark, variables = _mark(pid), procfs.environ(pid)
        service, _, generation = mark.removeprefix(prefix).removesuffix(":").partition(":")
        is_leader = procfs.group_and_session(pid)[1] == pid and _mark(procfs.parent(pid)) != mark
        if generation.isdecimal():
            digest = variables.get(DIGEST.encode(), b"").decode(errors="replace")
            grant = variables.get(GRANT.encode(), b"").decode(errors="replace")
            started = procfs.start_ticks(pid)
            found.append(
                Found(pid, mark, service, int(generation), digest, grant, is_leader, started)
            )
    return found


def marked(prefix: str) -> list[int]:
    """This user's processes, save ourselves, whose mark starts with `prefix`."""
    return [pid for pid in procfs.pids() if pid != os.getpid() and carries_mark(pid, prefix)]


def end_marked(prefix: str, grace_s: float, *, are_watched: bool = False) -> int:
    """Terminate every process whose mark starts with `prefix`; kill those left after `grace_s`.

    Children of ours are reaped, unless they `are_watched`: who watches them wants their status.
    Blocks until they are gone, save those stuck in the kernel. Returns how many were found.
    """
    found: set[int] = set()
    signals, timeout_s = [signal.SIGTERM, signal.SIGCONT], grace_s
    give_up_at = time.monotonic() + grace_s + _KILL_TIMEOUT_S
    while (pids := marked(prefix)) and time.monotonic() < give_up_at:
        with _held(pids, prefix) as pidfds:
            found |= pidfds.keys()
            for pidfd in pidfds.values():
                for number in signals:
                    with suppress(ProcessLookupError, PermissionError):
                        signal.pidfd_send_signal(pidfd, number)
            _wait_ended(pidfds.values(), timeout_s)
            if not are_watched:
                _reap(pidfds.values())
        signals, timeout_s = [signal.SIGKILL], _KILL_TIMEOUT_S
    return len(found)


def carries_mark(pid: int, prefix: str) -> bool:
    """Whether it is a process of this user with a mark in its environment that starts so.

    Root could read the marks that others put into theirs.
    """
    return _mark(pid).startswith(prefix) and procfs.real_uid(pid) == os.getuid()


def _mark(pid: int) -> str:
    return os.fsdecode(procfs.environ(pid).get(MARK.encode(), b""))


def _is_readable(pidfd: int) -> bool:
    """Whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def _held(pids: Iterable[int], prefix: str) -> Iterator[dict[int, int]]:
    """Pidfds of those of `pids` that, once held, still carry the mark: pids are recycled."""
    with ExitStack() as stack:
        held = {}
        for pid in pids:
            with suppress(OSError):  # gone, or we are short of descriptors: the next round looks
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                if carries_mark(pid, prefix):
                    held[pid] = pidfd
        yield held


def _wait_ended(pidfds: Iterable[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    waiting = set(pidfds)
    for pidfd in waiting:
        poll.register(pidfd, select.POLLIN)
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(left_s * 1000):
            poll.unregister(pidfd)
            waiting.discard(pidfd)


def _reap(pidfds: Iterable[int]) -> None:
    """Those that have ended and are children of ours: the daemon we were before started them."""
    for pidfd in pidfds:
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


@contextmanager
def _no_signal_blocked() -> Iterator[None]:
    """A child inherits the mask; SIGTERM blocked in it could never be delivered.

    The mask is set here and not in a `preexec_fn`, which would cost the quick vfork.
    """
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def inherited() -> dict[str, str]:
    """What a child gets of our own environment."""
    return {key: text for key, text in os.environ.items() if not key.startswith(_SCRUBBED)}


def _status(pidfd: int) -> ExitStatus | None:
    """The status of an ended child, which stays a zombie; None where it is no child of ours."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:  # adopted, or SIGCHLD is ignored here and the kernel has reaped it
        return None
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(code=result.si_status)
    return ExitStatus(signal=result.si_status, dumped_core=result.si_code == os.CLD_DUMPED)


def _told(launch: Launch, mark: str) -> dict[str, str]:
    """What the next daemon reads off the process."""
    return {MARK: mark, DIGEST: launch.digest, GRANT: launch.grant}


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _launch_error(what: str, error: OSError | ValueError) -> LaunchError:
    if not isinstance(error, OSError):
        return LaunchError(f"{what}: {error}", permanent=True)
    return LaunchError(
        f"{what}: {error.strerror}",
        hint=_HINTS.get(error.errno or 0, ""),
        permanent=error.errno not in _PASSING_ERRNOS,
        shortage=error.errno in _SHORTAGES,
    )


_HINTS = {
    errno.ENOENT: "see that the file is there, and the interpreter its first line names",
    errno.EACCES: "see that it is yours to use, and that a program is executable (chmod +x)",
    errno.ENOEXEC: "it is no program for this machine; a script needs #! in its first line",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or end some",
    errno.ENOMEM: "the machine is out of memory",
    errno.ENOSPC: "the disk is full",
}
