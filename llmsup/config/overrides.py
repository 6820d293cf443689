"""`--set KEY=VALUE`: the flags' level of the profile."""

import tomllib
from collections.abc import Iterable
from typing import Any

from llmsup.config.interpolated import Interpolated
from llmsup.config.wording import Key, dotted, quoted


def parse_override(text: str) -> tuple[Key, object]:
    """The key and the value of `KEY=VALUE`.

    VALUE is TOML where it is quoted, an array or a table, else text that is read as its field's
    type. Raises ValueError with what would be valid.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError('expected KEY=VALUE, such as "service.chat.ctx_size=8192"')
    return _key(name.strip()), _value(value.strip())


def keys_of(overrides: Iterable[str]) -> list[Key]:
    """Where they put something. Raises ValueError."""
    return [parse_override(text)[0] for text in overrides]


def apply_override(table: dict[str, Any], key: Key, value: object) -> None:
    """Put `value` at `key`; tables on the way are made. Raises ValueError at what is no table."""
    for depth, part in enumerate(key[:-1], start=1):
        table = table.setdefault(str(part), {})
        if not isinstance(table, dict):
            raise ValueError(f"{dotted(key[:depth])} is not a table")
    table[str(key[-1])] = value


def _key(name: str) -> Key:
    try:
        table: Any = tomllib.loads(f"{name} = 0")
    except (ValueError, RecursionError):
        table = {}
    key: list[str | int] = []
    while isinstance(table, dict) and len(table) == 1:
        [(part, table)] = table.items()
        key.append(part)
    if table != 0 or not key:
        raise ValueError(f"expected a dotted key before the =, got {quoted(name)}")
    return tuple(key)


def _value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return Interpolated(text)
    value = parsed["value"] if parsed.keys() == {"value"} else None
    return value if isinstance(value, str | list | dict) else Interpolated(text)
