"""What a daemon leaves to the next one, and taking it over.

Every process carries its mark (home, service, generation) and the digest of its launch in its
environment, so it is known by itself, whatever became of the files. A service's newest generation
is adopted; an older one, or one that no service of the profile wants, is a stray.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmsup.core.service import Want
from llmsup.host import memory, procfs
from llmsup.host.memory import Memory, Remembered
from llmsup.host.process import Found
from llmsup.keeper import Keeper
from llmsup.troubles import Troubles

SAVE_AFTER_S = 0.05


@dataclass(frozen=True)
class Takeover:
    """The services whose processes were adopted, those of them that were started otherwise than
    they would be now, and the marks of the generations that were not adopted.
    """

    adopted: frozenset[str]
    outdated: frozenset[str]
    strays: frozenset[str]


def take_over(
    found: Iterable[Found],
    keepers: Mapping[str, Keeper],
    wanted: Collection[str],
    unproved: Mapping[str, int],
) -> Takeover:
    """Adopt the leader of the newest generation of each wanted service.

    `unproved`: from which generation on a service has none that could be adopted. A helper that
    left for a session of its own looks like a leader, too: the oldest process is it.
    """
    everything = tuple(found)
    newest: dict[str, Found] = {}
    last: dict[str, int] = {}
    for each in sorted(everything, key=lambda one: (-one.generation, one.start_ticks)):
        last.setdefault(each.service, each.generation)
        is_unproved = each.generation >= unproved.get(each.service, each.generation + 1)
        if each.is_leader and not is_unproved:
            newest.setdefault(each.service, each)
    for name, keeper in keepers.items():
        if name not in newest:
            keeper.skip(last.get(name, 0))
    adoptions = {
        name: keepers[name].adopt(each)
        for name, each in newest.items()
        if name in wanted and name in keepers
    }
    adopted = frozenset(name for name, adoption in adoptions.items() if adoption is not None)
    kept = {newest[name].mark for name in adopted}
    return Takeover(
        adopted,
        frozenset(name for name, is_current in adoptions.items() if is_current is False),
        frozenset(each.mark for each in everything) - kept,
    )


class Remembering:
    """Keeps the file of `host.memory` up to date with the keepers."""

    def __init__(
        self,
        path: Path,
        profile_path: str,
        wanted: Collection[str],
        keepers: Mapping[str, Keeper],
        troubles: Troubles,
        *,
        measured_bytes: Callable[[str], int | None] = lambda _: None,
        asleep: Callable[[str], str] = lambda _: "",
    ) -> None:
        self._path = path
        self._profile_path = profile_path
        self._wanted = frozenset(wanted)
        self._keepers = keepers
        self._troubles = troubles
        self._measured_bytes = measured_bytes
        self._asleep = asleep
        self._timer: asyncio.TimerHandle | None = None
        self._is_ending = False

    def want(self, names: Collection[str]) -> None:
        """These are what the profile wants from now on."""
        self._wanted = frozenset(names)

    @property
    def asked(self) -> dict[str, str]:
        """What `Remembered.asked` says of each service, where it says anything."""
        found = {
            name: self._asked(name, keeper.service.want) for name, keeper in self._keepers.items()
        }
        return {name: asked for name, asked in found.items() if asked}

    def soon(self) -> None:
        """Save shortly: never between a death and the next spawn."""
        if self._timer is None and not self._is_ending:
            self._timer = asyncio.get_running_loop().call_later(SAVE_AFTER_S, self.now)

    def now(self) -> None:
        """Save. What cannot be saved is said, and costs the next daemon some knowledge only."""
        self._cancel()
        services = {
            name: Remembered(
                asked=self._asked(name, keeper.service.want),
                generation=keeper.service.generation,
                restarts=keeper.service.restarts,
                deaths=keeper.service.deaths,
                port=keeper.port,
                measured_bytes=self._measured_bytes(name),
            )
            for name, keeper in self._keepers.items()
        }
        with self._troubles.watched(
            f"what the next daemon needs is not being saved to {self._path}", self.soon
        ):
            memory.save(self._path, Memory(procfs.boot_id(), self._profile_path, services))

    def forget(self) -> None:
        """Remove the file for good: a stack that ends has nothing that was stopped by somebody."""
        self._cancel()
        self._is_ending = True
        with suppress(OSError):
            memory.forget(self._path)

    def _asked(self, name: str, want: Want) -> str:
        """As `Remembered.asked`, empty where the profile wants the same."""
        if want is Want.DOWN and (asleep := self._asleep(name)):
            return asleep
        return "" if (want is Want.UP) == (name in self._wanted) else want.value

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
