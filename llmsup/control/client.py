"""The daemon as its clients see it: typed verbs over the control socket.

Synchronous and on the standard library alone, because every `llmsup status` pays for its imports.
"""

import fcntl
import http.client
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from llmsup.config.paths import Paths
from llmsup.control.wire import (
    Answer,
    Ask,
    ModelInfo,
    Status,
    SwitchAsk,
    SwitchProgress,
    SwitchResult,
    UpstreamsInfo,
)
from llmsup.errors import LlmsupError, NotRunningError, UnknownStateError, UsageError

TIMEOUT_S = 5.0
POLL_S = 0.02
REPLACE_TIMEOUT_S = 30.0


class NoSocketError(UnknownStateError):
    """A daemon holds the lock, and nobody listens on its socket: it starts, stops, or lost it."""


class Client:
    """Asks the daemon of one home.

    Every verb raises NotRunningError where there is no daemon, UnknownStateError where one does not
    answer sensibly within `timeout_s`, and UsageError or LlmsupError with what the daemon refused.
    """

    def __init__(self, paths: Paths, *, timeout_s: float = TIMEOUT_S) -> None:
        self._paths = paths
        self._timeout_s = timeout_s

    def status(self) -> Status:
        """The whole stack."""
        answer = self._ask("GET", "/status")
        if not isinstance(answer, dict) or not {"daemon", "services", "routes"} <= answer.keys():
            raise self._unintelligible("an answer without the stack")
        return cast("Status", answer)

    def upstreams(self) -> list[UpstreamsInfo]:
        """Every route's upstream lists."""
        answer = self._ask("GET", "/upstreams")
        if not isinstance(answer, list):
            raise self._unintelligible("an answer that is not a list")
        return cast("list[UpstreamsInfo]", answer)

    def models(self) -> list[ModelInfo]:
        """What each model server says it serves."""
        answer = self._ask("GET", "/models")
        if not isinstance(answer, list):
            raise self._unintelligible("an answer that is not a list")
        return cast("list[ModelInfo]", answer)

    def switch(
        self,
        target: str,
        model: str | None = None,
        on_progress: Callable[[SwitchProgress], None] = lambda _: None,
    ) -> SwitchResult:
        """Have a service serve a model file (None: the profile's); returns once that has ended.

        Or switch to another profile. A switch that failed is a result. It goes on where this is
        interrupted.
        """
        body: SwitchAsk = {"target": target, "model": model}

        def read(response: http.client.HTTPResponse) -> Any:
            if response.status >= 400:
                return json.loads(response.read())
            line: Any = None
            with suppress(http.client.HTTPException, ConnectionError):  # the daemon has ended
                while received := response.readline():
                    line = json.loads(received)
                    if isinstance(line, dict) and "phase" in line:
                        on_progress(cast("SwitchProgress", line))
            return line

        result = self._ask("POST", "/switch", body, read=read)
        while isinstance(result, dict) and "profile" in result and "success" not in result:
            result = self._ask_next_daemon(read)
        if not isinstance(result, dict) or "success" not in result:
            raise self._ended_before()
        return cast("SwitchResult", result)

    def _ask_next_daemon(self, read: Callable[[http.client.HTTPResponse], Any]) -> Any:
        """What the daemon says of a switch that one before it began; a moment may pass until then.

        Raises UnknownStateError where there is none, or none that knows of a switch.
        """
        deadline = time.monotonic() + REPLACE_TIMEOUT_S
        while True:
            try:
                return self._ask("GET", "/switch", read=read)
            except NotRunningError:
                raise self._ended_before() from None
            except UnknownStateError:
                if time.monotonic() >= deadline:
                    raise
            except LlmsupError as error:
                raise UnknownStateError(error.message, hint=error.hint) from None
            time.sleep(POLL_S)

    def _ended_before(self) -> UnknownStateError:
        return UnknownStateError(
            "the daemon ended before the switch did",
            hint="llmsup start has what ran before serve again; llmsup status shows it",
        )

    def start(self, services: Iterable[str] = ()) -> Answer:
        """Want these up; none: those that the profile starts."""
        return self._do("/start", {"services": list(services)})

    def stop(self, services: Iterable[str] = (), *, now: bool = False) -> Answer:
        """Want these down; `now` skips the drain."""
        return self._do("/stop", {"services": list(services), "now": now})

    def restart(self, services: Iterable[str] = (), *, now: bool = False) -> Answer:
        """Want new processes of these; none: of all that are wanted."""
        return self._do("/restart", {"services": list(services), "now": now})

    def reload(self) -> Answer:
        """Have what the profile says now brought about; raises UsageError with its problems."""
        return self._do("/reload", {})

    def hand_over(self) -> Answer:
        """Have the daemon replaced by a new one that adopts everything."""
        return self._do("/handover", {})

    def shut_down(self, *, now: bool = False) -> Answer:
        """End the stack and the daemon; see `wait_gone`."""
        return self._do("/shutdown", {"now": now})

    def _do(self, path: str, body: Ask) -> Answer:
        answer = self._ask("POST", path, body)
        if not isinstance(answer, dict) or "changed" not in answer:
            raise self._unintelligible("an answer that does not say what changed")
        return cast("Answer", answer)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        is_repeated: bool = False,
        read: Callable[[http.client.HTTPResponse], Any] | None = None,
    ) -> Any:
        self._paths.require_short()
        self._paths.require_own()
        connection = _UnixConnection(self._paths.control_socket, self._timeout_s)
        try:
            connection.connect()
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            raise self._nobody() from None
        except BlockingIOError as error:  # the queue of connections is full
            raise self._mute(error) from None
        except OSError as error:
            raise UnknownStateError(
                f"cannot open {self._paths.control_socket}: {error.strerror or error}",
                hint="set LLMSUP_HOME to a directory of your own",
            ) from None
        try:
            connection.require_own_peer()
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Connection": "close"})
            response = connection.getresponse()
            answer = read(response) if read else json.loads(response.read())
        except OSError as error:
            if method == "GET" and isinstance(error, ConnectionError) and not is_repeated:
                # Accepted by a daemon that was just giving way to the next.
                return self._ask(method, path, is_repeated=True, read=read)
            raise self._mute(error) from None
        except (http.client.HTTPException, ValueError):
            raise self._unintelligible("something other than JSON over HTTP") from None
        finally:
            connection.close()
        if response.status >= 400:
            raise _refusal(answer) or self._unintelligible(f"HTTP status {response.status}")
        return answer

    def _nobody(self) -> LlmsupError:
        pid = daemon_is_alive(self._paths)
        if pid is None:
            return NotRunningError("llmsup is not running", hint="llmsup start")
        who = f" (pid {pid})" if pid else ""
        return NoSocketError(
            f"the daemon{who} is starting or stopping: it has no control socket",
            hint="try again; if it stays so, llmsup stop ends it",
        )

    def _mute(self, error: OSError) -> UnknownStateError:
        if isinstance(error, TimeoutError | BlockingIOError):
            return UnknownStateError(
                f"the daemon ({self._who()}) did not answer within {self._timeout_s:g} s",
                hint=f"see {self._paths.daemon_log}; if it stays so, kill it and llmsup start",
            )
        return UnknownStateError(
            f"the daemon ({self._who()}) closed the connection",
            hint=f"try again; its log is {self._paths.daemon_log}",
        )

    def _unintelligible(self, what: str) -> UnknownStateError:
        return UnknownStateError(
            f"the daemon ({self._who()}) sent {what}",
            hint="it may be of another version: llmsup stop, then llmsup start",
        )

    def _who(self) -> str:
        pid = daemon_is_alive(self._paths)
        return f"pid {pid}" if pid else "pid unknown"


def daemon_is_alive(paths: Paths) -> int | None:
    """The pid of the daemon that holds the lock, None where there is none.

    0 in the instant in which it has not written it yet. The look takes a shared lock for
    microseconds, so clients do not see each other.
    """
    try:
        file = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        written = os.pread(file, 32, 0).strip()
        return int(written) if written.isdigit() else 0
    finally:
        os.close(file)
    return None


def wait_gone(paths: Paths, *, timeout_s: float) -> bool:
    """Wait until no daemon holds the lock; False where one still does after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while daemon_is_alive(paths) is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.close()
            raise

    def require_own_peer(self) -> None:
        """Raise LlmsupError where another user listens on the socket."""
        size = struct.calcsize("3i")
        credentials = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        _pid, uid, _gid = struct.unpack("3i", credentials)
        if uid != os.geteuid():
            raise LlmsupError(
                f"{self._path} is served by uid {uid}, not by you",
                hint="set LLMSUP_HOME to a directory of your own",
            )


def _refusal(answer: Any) -> LlmsupError | None:
    """The error that the daemon's answer carries."""
    match answer:
        case {"error": {"message": str(message), "hint": str(hint), "exit_code": int(code)}}:
            kind = UsageError if code == UsageError.exit_code else LlmsupError
            return kind(message, hint=hint)
    return None
