"""What `llmsup switch` chose, in its file: it outlives the daemon, the stack and the machine.

The daemon writes it; others may read it at any time.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from llmsup.config.choice import NOTHING, Choice
from llmsup.config.paths import Paths
from llmsup.config.profiles import default_name, find
from llmsup.errors import ConfigError
from llmsup.host.sealed import Sealed

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 4 * 1024 * 1024
LOADS_KEPT = 200


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A switch from the profile file `old` to `new`, called `target`, that is not over.

    Who finds it has the old one serve again, but for the daemon that it was handed over to.
    `reason`: what failed, on the way back. `began_at` is monotonic seconds of the boot `boot_id`,
    during which `asked` tells what the operator asked of services, as `memory.Remembered` has it.
    `unready`: services that were wanted, and not ready when it began.
    """

    old: str
    new: str
    target: str
    began_at: float
    boot_id: str
    asked: dict[str, str] = {}
    unready: tuple[str, ...] = ()
    reason: str = ""


class Choices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The choices by the files of their profiles; `load_s`: how long model files took to load.

    `profile`: the name or the file of the one that was switched to; empty for none.
    """

    profiles: dict[str, Choice] = {}
    load_s: dict[str, float] = {}
    profile: str = ""
    trial: Trial | None = None

    def of(self, profile_path: str) -> Choice:
        """What was chosen over one profile."""
        return self.profiles.get(profile_path, NOTHING)

    @property
    def usable(self) -> dict[str, Choice]:
        """Without models whose files are not there: what the profile says is started then."""
        return {path: _usable(choice) for path, choice in self.profiles.items()}

    def with_choice(self, profile_path: str, choice: Choice) -> "Choices":
        """The same with another choice over one profile."""
        others = {path: each for path, each in self.profiles.items() if path != profile_path}
        kept = {} if choice == NOTHING else {profile_path: choice}
        return replace(self, profiles=others | kept)

    def with_load(self, model: str, load_s: float) -> "Choices":
        """The same with how long a model file took; the oldest are forgotten."""
        others = {path: each for path, each in self.load_s.items() if path != model}
        last = dict(list(others.items())[-LOADS_KEPT + 1 :])
        return replace(self, load_s=last | {model: load_s})


_FILE = Sealed("choices", Choices, VERSION, MAX_BYTES)


def save(path: Path, choices: Choices) -> None:
    """Replace the file. Raises OSError."""
    _FILE.save(path, choices)


def load(path: Path) -> Choices:
    """What was saved; nothing where there is no file or it cannot be trusted (set aside)."""
    return _FILE.load(path) or Choices()


def profile_meant(home: Paths, environ: Mapping[str, str]) -> str:
    """The profile that is meant where none is named, by its name or file.

    The one that was switched to, or from in a switch that is not over; else that of `default_name`.
    """
    kept = peek(home.choices)
    chosen = kept.trial.old if kept.trial is not None else kept.profile
    if chosen:
        try:
            find(chosen, home.config)
        except ConfigError:
            log.warning("%s, which was switched to, is not there", chosen)
        else:
            return chosen
    return default_name(environ)


def note_started(home: Paths, profile: Path) -> None:
    """A profile is started: another one that was switched to, or tried, is not meant any more.

    Raises OSError.
    """
    kept = load(home.choices)
    found = kept
    if kept.trial is not None and kept.trial.old != str(profile):
        found = replace(found, trial=None)
    if kept.profile:
        with suppress(ConfigError):  # its file is not there just now
            if find(kept.profile, home.config) != profile:
                found = replace(found, profile="")
    if found != kept:
        save(home.choices, found)


def note_failed(path: Path, reason: str) -> None:
    """A profile that is tried cannot be used, for this reason. Raises OSError."""
    kept = load(path)
    if kept.trial is not None:
        save(path, replace(kept, trial=replace(kept.trial, reason=reason)))


def peek(path: Path) -> Choices:
    """The same for who does not own it: an unreadable one counts as empty and stays in place."""
    try:
        return _FILE.read(path) or Choices()
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read (%s)", path, error)
        return Choices()


def _usable(choice: Choice) -> Choice:
    models = {name: model for name, model in choice.models.items() if Path(model).is_file()}
    if gone := sorted(choice.models.keys() - models.keys()):
        log.warning("the files of the models chosen for %s are not there", ", ".join(gone))
    return replace(choice, models=models)
