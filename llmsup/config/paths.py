"""Where llmsup keeps its files: XDG directories, or everything below `LLMSUP_HOME`."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from llmsup.errors import LlmsupError

SOCKET_PATH_MAX_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1


@dataclass(frozen=True)
class Paths:
    """The directories of one installation, and the files in them that others name."""

    config: Path
    state: Path
    runtime: Path
    logs: Path

    @property
    def profiles(self) -> Path:
        """The user's own profiles, one TOML file each."""
        return self.config / "profiles"

    @property
    def control_socket(self) -> Path:
        """The daemon's control API."""
        return self.runtime / "control.sock"

    @property
    def lock(self) -> Path:
        """Held with flock by the one daemon of this home."""
        return self.state / "daemon.lock"

    @property
    def gateway(self) -> Path:
        """Envoy's configuration files and its admin socket."""
        return self.runtime / "gateway"

    @property
    def daemon_log(self) -> Path:
        """What the daemon says, one event a line."""
        return self.logs / "daemon.log"

    @property
    def memory(self) -> Path:
        """What the daemon leaves for its successor."""
        return self.state / "memory.json"

    @property
    def hold_answer(self) -> Path:
        """Whether the Envoy that was asked last can hold streams."""
        return self.state / "hold.json"

    @property
    def events(self) -> Path:
        """State changes and publications, one JSON object a line."""
        return self.state / "events.jsonl"

    def service_log(self, service: str) -> Path:
        """The output of one service, rotated to `.1`, `.2`, ….

        A dot keeps it apart from the daemon's own log whatever a service is called.
        """
        return self.logs / f"{service}.service.log"

    def require_short(self) -> None:
        """Raise LlmsupError where a socket below these directories could not have its name."""
        longest = self.gateway / "hot_udp_parent_1234567890"
        if len(os.fsencode(longest)) > SOCKET_PATH_MAX_BYTES:
            raise LlmsupError(
                f"{self.runtime} is too long a path for Unix sockets",
                hint="set LLMSUP_HOME to a shorter directory",
            )

    def create(self) -> None:
        """Make the directories, private to this user; refuse ones that belong to another.

        Raises LlmsupError with the directory and its owner.
        """
        self.require_short()
        for directory in (self.config, self.state, self.runtime, self.logs):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise LlmsupError(
                    f"cannot create {directory}: {error.strerror}",
                    hint="set LLMSUP_HOME to a directory you can write",
                ) from None
            found = directory.stat()
            if found.st_uid != os.getuid():
                raise LlmsupError(
                    f"{directory} belongs to uid {found.st_uid}, not to you",
                    hint="set LLMSUP_HOME to a directory of your own",
                )
            if directory in (self.state, self.runtime) and stat.S_IMODE(found.st_mode) & 0o077:
                directory.chmod(0o700)


def paths(environ: Mapping[str, str] = os.environ) -> Paths:
    """The paths of this user, or those below `LLMSUP_HOME` where it is set."""
    if home := environ.get("LLMSUP_HOME"):
        root = _absolute(home)
        return Paths(root / "config", root / "state", root / "run", root / "logs")
    xdg = platformdirs.PlatformDirs("llmsup", appauthor=False)
    state = xdg.user_state_path
    # Not in XDG_RUNTIME_DIR: that goes with the last login session, and the daemon stays.
    return Paths(xdg.user_config_path, state, state / "run", state / "logs")


def _absolute(home: str) -> Path:
    """The directory of LLMSUP_HOME. Raises LlmsupError for one that depends on who looks."""
    try:
        root = Path(home).expanduser()
    except RuntimeError:
        root = Path(home)
    if not root.is_absolute():
        raise LlmsupError(
            f"LLMSUP_HOME is {home}, which is no absolute path",
            hint="set it to a directory of your own, from / or ~/",
        )
    return root
