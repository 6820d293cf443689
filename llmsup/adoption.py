"""What a daemon leaves to the next one, and taking it over.

Every process carries its mark (home, service, generation) and the digest of its launch in its
environment, so it is known by itself, whatever became of the files. A service's newest generation
is adopted; an older one, or one that no service of the profile wants, is a stray.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmsup.core.service import Want
from llmsup.host import memory, procfs
from llmsup.host.memory import Memory, Remembered
from llmsup.host.process import Found
from llmsup.keeper import Keeper

log = logging.getLogger(__name__)

SAVE_AFTER_S = 0.05


@dataclass(frozen=True)
class Takeover:
    """The services whose processes were adopted, and the processes that were not."""

    adopted: frozenset[str]
    strays: tuple[Found, ...]


def take_over(
    found: Iterable[Found], keepers: Mapping[str, Keeper], wanted: Collection[str]
) -> Takeover:
    """Adopt the newest process of each wanted service."""
    newest: dict[str, Found] = {}
    for each in sorted(found, key=lambda found: found.generation):
        newest[each.service] = each
    adopted = frozenset(
        name
        for name, each in newest.items()
        if name in wanted and name in keepers and keepers[name].adopt(each)
    )
    strays = tuple(
        each for each in found if each.service not in adopted or newest[each.service] != each
    )
    return Takeover(adopted, strays)


class Remembering:
    """Keeps the file of `host.memory` up to date with the keepers."""

    def __init__(
        self, path: Path, profile_path: str, wanted: Collection[str], keepers: Mapping[str, Keeper]
    ) -> None:
        self._path = path
        self._profile_path = profile_path
        self._wanted = frozenset(wanted)
        self._keepers = keepers
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Save shortly: never between a death and the next spawn."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SAVE_AFTER_S, self.now)

    def now(self) -> None:
        """Save. What cannot be saved is said, and costs the next daemon some knowledge only."""
        self._cancel()
        services = {
            name: Remembered(
                is_stopped=name in self._wanted and keeper.service.want is Want.DOWN,
                generation=keeper.service.generation,
                restarts=keeper.service.restarts,
                deaths=keeper.service.deaths,
                port=keeper.unit.port,
            )
            for name, keeper in self._keepers.items()
        }
        try:
            memory.save(self._path, Memory(procfs.boot_id(), self._profile_path, services))
        except OSError as error:
            log.warning("what a new daemon would need is not being saved: %s", error)

    def forget(self) -> None:
        """Remove the file: nothing is left to be taken over."""
        self._cancel()
        with suppress(OSError):
            self._path.unlink()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
