"""Where llmsup keeps its files: XDG directories, or everything below `LLMSUP_HOME`."""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from llmsup.errors import LlmsupError

PRIVATE_UMASK = 0o077
"""Of the daemon, its children and the command line: nobody else reads what they write."""

SOCKET_PATH_MAX_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1


@dataclass(frozen=True)
class Paths:
    """The directories of one installation, and the files in them that others name.

    `home`: the directory of LLMSUP_HOME, where that is what they are below.
    """

    config: Path
    state: Path
    runtime: Path
    logs: Path
    home: Path | None = None

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
    def choices(self) -> Path:
        """What `llmsup switch` chose over the profiles."""
        return self.state / "choices.json"

    @property
    def hold_answer(self) -> Path:
        """Whether the Envoy that was asked last can hold streams."""
        return self.state / "hold.json"

    @property
    def ledger(self) -> Path:
        """What loads took of the card."""
        return self.state / "ledger.json"

    @property
    def slots(self) -> Path:
        """The prompt caches of servers that gave way, as these saved them. A directory."""
        return self.state / "slots"

    @property
    def slot_index(self) -> Path:
        """What is in it."""
        return self.state / "slots.json"

    @property
    def engines(self) -> Path:
        """What is known of each llama-server that was asked."""
        return self.state / "engines.json"

    @property
    def events(self) -> Path:
        """State changes and publications, one JSON object a line."""
        return self.state / "events.jsonl"

    @property
    def crashes(self) -> Path:
        """What is kept of deaths, a directory each."""
        return self.state / "crashes"

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

        The home and the configuration may be read by others, if they are so already.

        Raises LlmsupError with the directory and its owner.
        """
        self.require_short()
        self.require_own()
        for directory in self._directories:
            is_secret = directory in (self.state, self.runtime, self.logs)
            make_private(directory, loose=0o077 if is_secret else 0o022)

    def require_own(self) -> None:
        """Raise LlmsupError where a directory that is there belongs to another user."""
        for directory in self._directories:
            with suppress(OSError):  # not there, or out of our reach: whoever needs it says so
                require_own(directory)

    @property
    def _directories(self) -> tuple[Path, ...]:
        home = () if self.home is None else (self.home,)
        return (*home, self.config, self.state, self.runtime, self.logs)


def make_private(directory: Path, *, loose: int = 0o077) -> None:
    """Make a directory of this user, or take away the permissions `loose` of one that is there.

    Raises LlmsupError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(directory)
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & loose or mode & 0o700 != 0o700:
            directory.chmod(mode & ~loose | 0o700)
            mode = stat.S_IMODE(directory.stat().st_mode)
    except OSError as error:
        raise LlmsupError(
            f"cannot create {directory}: {error.strerror}",
            hint="set LLMSUP_HOME to a directory you can write",
        ) from None
    if mode & loose:
        raise LlmsupError(
            f"other users can use {directory}, and that cannot be changed",
            hint="set LLMSUP_HOME to a directory on a Linux file system",
        )


def require_own(directory: Path) -> None:
    """Raise LlmsupError for a directory of another user, or a link that another user has made.

    Raises OSError where it cannot be looked at.
    """
    for found in (directory.lstat(), directory.stat()):
        if found.st_uid != os.geteuid():
            as_owner = f"run it as its owner: sudo -u '#{found.st_uid}' …"
            raise LlmsupError(
                f"{directory} belongs to uid {found.st_uid}, not to you",
                hint="set LLMSUP_HOME to a directory of your own" if os.geteuid() else as_owner,
            )


def paths(environ: Mapping[str, str] = os.environ) -> Paths:
    """The paths of this user, or those below `LLMSUP_HOME` where it is set."""
    if home := environ.get("LLMSUP_HOME"):
        root = _absolute(home)
        return Paths(root / "config", root / "state", root / "run", root / "logs", root)
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
