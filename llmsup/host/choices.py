"""What `llmsup switch` chose, in its file: it outlives the daemon, the stack and the machine.

The daemon writes it; others may read it at any time.
"""

import logging
from pathlib import Path

import msgspec
from msgspec.structs import replace

from llmsup.config.choice import NOTHING, Choice
from llmsup.host.sealed import Sealed

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 4 * 1024 * 1024
LOADS_KEPT = 200


class Choices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The choices by the files of their profiles; `load_s`: how long model files took to load."""

    profiles: dict[str, Choice] = {}
    load_s: dict[str, float] = {}

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
