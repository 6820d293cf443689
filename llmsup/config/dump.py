"""A loaded profile as a document and as TOML, for people to read: what is in effect, no secrets."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Meta, Struct
from msgspec.structs import fields

from llmsup.config.masking import masked, masked_variable
from llmsup.config.schema import Profile
from llmsup.config.units import duration, parse_duration_s, size

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def document(profile: Profile) -> dict[str, Any]:
    """`profile` under its TOML names, durations with units, values of secrets masked.

    Keys without a value are left out.
    """
    return _table(profile)


def toml(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """A document as a profile that says the same. Tables come after the values."""
    values = {name: item for name, item in table.items() if not isinstance(item, dict)}
    lines = [f"{_key(name)} = {_value(item)}" for name, item in values.items()]
    blocks: list[str] = []
    if lines:
        header = [f"[{'.'.join(map(_key, path))}]"] if path else []
        blocks.append("\n".join(header + lines))
    for name, item in table.items():
        if isinstance(item, dict) and item:
            blocks.append(toml(item, (*path, name)))
    return "\n\n".join(blocks)


def _table(struct: Struct) -> dict[str, Any]:
    table: dict[str, Any] = {}
    if (tag := struct.__struct_config__.tag) is not None:
        table[str(struct.__struct_config__.tag_field)] = tag
    for field in fields(struct):
        value = getattr(struct, field.name)
        if value is not None:
            table[field.encode_name] = _item(field.encode_name, value, field.type)
    return table


def _item(name: str, value: Any, wanted: Any) -> Any:
    if isinstance(value, Struct):
        return _table(value)
    if name == "env":
        return {key: masked_variable(key, text) for key, text in value.items()}
    if isinstance(value, dict):
        return {key: _item(key, item, None) for key, item in value.items()}
    if name in {"args", "command"}:
        return masked(value)
    metas = (meta for meta in getattr(wanted, "__metadata__", ()) if isinstance(meta, Meta))
    for meta in metas:
        if unit := (meta.extra or {}).get("unit"):
            return _WRITTEN[unit](value)
    return list(value) if isinstance(value, tuple) else value


def _duration(seconds: float) -> str:
    text = duration(seconds)
    return text if parse_duration_s(text) == seconds else f"{seconds:f}s"


_WRITTEN: Mapping[str, Callable[[Any], str]] = {
    "duration": _duration,
    "size": size,
    "share": str,
}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return _quoted(value.replace("$", "$$"))
    return str(value)


def _key(name: str) -> str:
    """A key as TOML writes it, whole: variables are not filled in there."""
    return name if _BARE_KEY.fullmatch(name) else _quoted(name)


def _quoted(text: str) -> str:
    return '"' + "".join(map(_character, text)) + '"'


def _character(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else f"\\U{ord(character):08x}"
