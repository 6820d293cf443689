"""Every error that llmsup raises on purpose.

LlmsupError                exit 1   something failed
├── UsageError             exit 2   the command line asks for something that is not there
├── ConfigError            exit 2   the profile has problems; lists all of them
├── LaunchError            exit 1   a service cannot be started on this machine
│   └── NoRoomError        exit 1   the card cannot hold what it insists on
├── ModelFileError         exit 1   a model file is missing, damaged or not understood
├── GatewayError           exit 1   Envoy cannot be set up here
├── NotRunningError        exit 3   no daemon answers for this home
└── UnknownStateError      exit 4   a daemon is there but cannot be understood

Each carries one line for the person (`message`) and what to do next (`hint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class LlmsupError(Exception):
    """Something failed; `message` is one line, `hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LlmsupError):
    """The command line names something that does not exist."""

    exit_code = 2


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a profile: where it stands and what would be valid."""

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where}: {self.message}"


class ConfigError(LlmsupError):
    """A profile has problems. All of them are listed, one a line."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems), hint=hint)


class Flaw(Enum):
    """What is wrong with a model file. The value is for people."""

    MISSING = "model file missing"
    FORMAT = "model file of another format"
    TRUNCATED = "model file truncated"
    CORRUPT = "model file corrupt"
    UNREADABLE = "model file not readable"
    UNKNOWN = "model file not understood"


class LaunchError(LlmsupError):
    """A service cannot be started. `permanent`: trying again without a change is useless.

    `shortage`: the daemon or the machine is short of something, whatever the service is like.
    `flaw`: what is wrong with its model file, where it is that.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        permanent: bool = False,
        shortage: bool = False,
        flaw: Flaw | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.permanent = permanent
        self.shortage = shortage
        self.flaw = flaw


class NoRoomError(LaunchError):
    """What a service insists on does not fit the card, as it is now or ever (`permanent`)."""


class ModelFileError(LlmsupError):
    """The header of a model file cannot be read. Without `name` the file is not known here."""

    def __init__(self, flaw: Flaw, detail: str, *, name: str = "") -> None:
        where = f"{name}: " if name else ""
        super().__init__(f"{flaw.value}: {where}{detail}")
        self.flaw = flaw
        self.detail = detail

    @property
    def is_certain(self) -> bool:
        """Whether no engine could load it; otherwise it may know more than we do."""
        return self.flaw not in {Flaw.UNREADABLE, Flaw.UNKNOWN}


class GatewayError(LlmsupError):
    """Envoy cannot be set up on this machine."""


class NotRunningError(LlmsupError):
    """No daemon answers on this home's control socket."""

    exit_code = 3


class UnknownStateError(LlmsupError):
    """A daemon holds this home but does not answer in a way we understand."""

    exit_code = 4
