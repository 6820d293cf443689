"""What is wrong with a profile, collected while it is read."""

from pathlib import Path

from llmsup.config.wording import Key, dotted, one_line
from llmsup.errors import Problem

SET = "--set"


class Problems:
    """Collects problems: the first at each key, under the file or the flag that it came from.

    `models`: the keys of those that are about model files alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._flags: list[Key] = []
        self._found: dict[tuple[str, Key], Problem] = {}
        self.models: list[Key] = []

    def report(self, key: Key, message: str) -> None:
        """Note what is wrong at `key`."""
        self.add(self._file(key), key, message)

    def report_model(self, key: Key, message: str) -> None:
        """Report what is wrong with a model file, which a profile can be shown without."""
        if (self._file(key), key) not in self._found:
            self.models.append(key)
        self.report(key, message)

    def _file(self, key: Key) -> str:
        by_flag = any(key[: len(flag)] == flag for flag in self._flags)
        return SET if by_flag else str(self._path)

    def add(self, file: str, key: Key, message: str) -> None:
        """Note what is wrong in another file."""
        problem = Problem(one_line(file), dotted(key), one_line(message))
        self._found.setdefault((file, key), problem)

    def note_flag(self, key: Key) -> None:
        """From now on what is wrong at `key` and below is the flag's."""
        self._flags.append(key)

    def all(self) -> list[Problem]:
        """Everything that was noted."""
        return list(self._found.values())
