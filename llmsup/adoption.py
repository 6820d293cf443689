"""Taking over what an earlier daemon left alive.

Every process carries its mark (home, service, generation) and the digest of its launch in its
environment, so it is known by itself, whatever became of the files. A service's newest generation
is adopted; an older one, or one that no service of the profile wants, is a stray.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from llmsup.host.process import Found
from llmsup.keeper import Keeper


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
