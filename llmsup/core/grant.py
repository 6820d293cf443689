"""What a process may have of the card, and how that is written into its environment."""

from dataclasses import dataclass

import msgspec

from llmsup.core.options import Options
from llmsup.core.plan import Placement


@dataclass(frozen=True, slots=True)
class Grant:
    """`placement` is None where nothing could be planned.

    `device`: the UUID of the card; None where nothing is known of any, empty where the one to be
    used is not there, and others must not be used instead.
    """

    placement: Placement | None = None
    device: str | None = None


UNPLANNED = Grant()
"""For what needs nothing of the card, or whose needs are not known."""


class _Written(msgspec.Struct, frozen=True):
    options: Options | None
    device: str | None


def written(grant: Grant) -> str:
    """What the next daemon has to know of it; empty where it is nothing."""
    if grant == UNPLANNED:
        return ""
    content = _Written(grant.placement.options if grant.placement else None, grant.device)
    return msgspec.json.encode(content).decode()


def read(text: str) -> tuple[Options | None, str | None]:
    """The options and the card; neither of what `written` has not written."""
    try:
        content = msgspec.json.decode(text, type=_Written)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None, None
    return content.options, content.device
