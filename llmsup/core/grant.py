"""What a process may have of the card, and how that is written into its environment."""

from dataclasses import dataclass

import msgspec

from llmsup.core.options import Options
from llmsup.core.plan import Placement
from llmsup.core.shrinking import Shrunk


@dataclass(frozen=True, slots=True)
class Grant:
    """`placement` is None where nothing could be planned.

    `device`: the UUID of the card; None where nothing is known of any, empty where the one to be
    used is not there, and others must not be used instead. `shrunk`: with how much it ran out of
    memory before, if it did.
    """

    placement: Placement | None = None
    device: str | None = None
    shrunk: Shrunk | None = None


UNPLANNED = Grant()
"""For what needs nothing of the card, or whose needs are not known."""


class Written(msgspec.Struct, frozen=True):
    """What of a grant the next daemon reads off a process."""

    options: Options | None = None
    device: str | None = None
    shrunk: Shrunk | None = None


def written(grant: Grant) -> str:
    """What the next daemon has to know of it; empty where it is nothing."""
    if grant == UNPLANNED:
        return ""
    options = grant.placement.options if grant.placement else None
    return msgspec.json.encode(Written(options, grant.device, grant.shrunk)).decode()


def may_use_card(text: str) -> bool:
    """Whether a process whose grant was written so may have memory of the card."""
    options = read(text).options
    return bool(text) and (options is None or options.gpu_layers > 0)


def read(text: str) -> Written:
    """What was written; nothing where `written` has not written that."""
    try:
        return msgspec.json.decode(text, type=Written)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return Written()
