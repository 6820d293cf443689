"""What `llmsup switch` chose over a profile; only a flag has precedence over it."""

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from llmsup.config.wording import Key


class Choice(Struct, frozen=True, forbid_unknown_fields=True):
    """Over one profile: the `active` service of single mode, and model files by service.

    `unfinished`: of a switch that goes on, which is not in the rest yet: the first generation of a
    service that has not proved itself. A daemon that finds any takes over from one that died over
    it.
    """

    active: str | None = None
    models: dict[str, str] = {}
    unfinished: dict[str, int] = {}


NOTHING = Choice()


def apply_choice(raw: dict[str, Any], choice: Choice, flags: Collection[Key]) -> None:
    """Put the choice into the tables of a profile, as far as they have a place for it.

    What flags say is left as it is, and so is a service that has gone or has no model any more.
    """
    services = raw.get("service")
    tables = services if isinstance(services, dict) else {}
    for name, model in choice.models.items():
        if _has_model(tables.get(name)) and not is_flagged(("service", name, "model"), flags):
            tables[name]["model"] = model
    is_single = raw.get("mode") == "single" and choice.active in tables
    if is_single and not is_flagged(("active",), flags):
        raw["active"] = choice.active


def is_flagged(key: Key, flags: Collection[Key]) -> bool:
    """Whether a flag has said what stands at `key`."""
    return any(key[: len(flag)] == flag for flag in flags)


def _has_model(table: object) -> bool:
    return isinstance(table, Mapping) and table.get("kind") == "llama-server"
