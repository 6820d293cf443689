"""TOML tables to frozen structs, listing every problem instead of stopping at the first.

A value that cannot be used is left out, and where a struct cannot do without it an empty one takes
its place. So the rules that follow see as much of a profile as possible; what was decoded may only
be kept where nothing was reported.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import UNSET, Meta, Struct, ValidationError, convert
from msgspec.structs import FieldInfo, fields

from llmsup.config.interpolated import Interpolated, made_of
from llmsup.config.units import parse_duration_s, parse_share, parse_size_bytes
from llmsup.config.wording import Key, choices, quoted, shown, suggestion

Report = Callable[[Key, str], None]
"""Takes one problem: the key it stands at, and what would be valid there."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_LOGICAL = {"true": True, "false": False}


def decode(value: object, wanted: Any, key: Key, report: Report) -> Any:
    """`value` as the type `wanted`, or UNSET where there is nothing usable."""
    if value is UNSET:
        return UNSET
    bare, _ = _plain(wanted)
    members = get_args(bare)
    if _is_struct(bare):
        return _struct(value, bare, key, report)
    if get_origin(bare) is tuple:
        return _array(value, wanted, key, report)
    if get_origin(bare) is dict:
        return _mapping(value, wanted, key, report)
    if members and all(map(_is_struct, members)):
        return _tagged(value, members, key, report)
    return _leaf(value, wanted, key, report)


def expected(wanted: Any) -> str:
    """What is valid for the type `wanted`, in words."""
    bare, metas = _plain(wanted)
    for meta in metas:
        if meta.description:
            return meta.description
    if get_origin(bare) in {Union, UnionType}:
        words = [expected(member) for member in get_args(bare) if member is not NoneType]
        return " or ".join(dict.fromkeys(words))
    if get_origin(bare) is Literal:
        return choices(get_args(bare))
    if get_origin(bare) is tuple:
        return "an array"
    names = {str: "a string", bool: "true or false", int: "an integer"}
    return names.get(bare, "a table") + "".join(map(_range, metas))


def _range(meta: Meta) -> str:
    if meta.ge is not None and meta.le is not None and meta.le < 2**31 - 1:
        return f" from {meta.ge} to {meta.le}"
    return "" if meta.ge is None else f" of at least {meta.ge}"


def _plain(wanted: Any) -> tuple[Any, tuple[Meta, ...]]:
    if get_origin(wanted) is Annotated:
        bare, *metas = get_args(wanted)
        return bare, tuple(meta for meta in metas if isinstance(meta, Meta))
    return wanted, ()


def _is_struct(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, Struct)


@cache
def _fields(wanted: type[Struct]) -> dict[str, FieldInfo]:
    return {field.encode_name: field for field in fields(wanted)}


def _struct(value: object, wanted: type[Struct], key: Key, report: Report) -> Any:
    if not isinstance(value, dict):
        report(key, f"expected a table, got {shown(value)}")
        return UNSET
    known = _fields(wanted)
    tag_field = wanted.__struct_config__.tag_field
    for name in value:
        if name not in known and name != tag_field:
            report((*key, name), f"unknown key; {suggestion(name, known)}")
    usable: dict[str, Any] = {}
    for name, field in known.items():
        decoded: Any = UNSET
        if name in value:
            decoded = decode(value[name], field.type, (*key, name), report)
        elif field.required:
            report((*key, name), f"missing; expected {expected(field.type)}")
        if decoded is UNSET and field.required:
            decoded = "" if _plain(field.type)[0] is str else ()
        if decoded is not UNSET:
            usable[field.name] = decoded
    return wanted(**usable)


def _tagged(value: object, members: tuple[Any, ...], key: Key, report: Report) -> Any:
    if not isinstance(value, dict):
        return _struct(value, members[0], key, report)
    kinds = {str(member.__struct_config__.tag): member for member in members}
    tag_field = str(members[0].__struct_config__.tag_field)
    kind = value.get(tag_field)
    if isinstance(kind, str) and kind in kinds:
        return _struct(value, kinds[kind], key, report)
    if kind is not UNSET:
        got = f"got {shown(kind)}" if tag_field in value else "it is missing"
        report((*key, tag_field), f"expected {choices(kinds)}; {got}")
    return UNSET


def _array(value: object, wanted: Any, key: Key, report: Report) -> Any:
    bare, metas = _plain(wanted)
    item_type = get_args(bare)[0]
    if not isinstance(value, list):
        report(key, f"expected an array, got {shown(value)}")
        return UNSET
    if any(len(value) < (meta.min_length or 0) for meta in metas):
        report(key, "expected an array with at least one entry")
        return UNSET
    items = (
        decode(item, item_type, (*key, position), report) for position, item in enumerate(value)
    )
    return tuple(item for item in items if item is not UNSET)


def _mapping(value: object, wanted: Any, key: Key, report: Report) -> Any:
    bare, _ = _plain(wanted)
    name_type, item_type = get_args(bare)
    if not isinstance(value, dict):
        report(key, f"expected a table, got {shown(value)}")
        return UNSET
    items: dict[str, Any] = {}
    for name, item in value.items():
        if _leaf(name, name_type, (*key, name), report) is UNSET:
            continue
        decoded = decode(item, item_type, (*key, name), report)
        if decoded is not UNSET:
            items[name] = decoded
    return items


def _leaf(value: object, wanted: Any, key: Key, report: Report) -> Any:
    _, metas = _plain(wanted)
    extra = {name: item for meta in metas for name, item in (meta.extra or {}).items()}
    try:
        if isinstance(value, str):
            _require_sane(value)
        readings = _READINGS.get(extra.get("unit", ""), _readings)(value)
        synonyms = extra.get("synonyms", {})
        for reading in readings:
            if type(reading) is int and reading in synonyms:
                return synonyms[reading]
            try:
                result = convert(reading, wanted, strict=True)
            except ValidationError:
                continue
            if isinstance(result, str) and isinstance(value, str):
                return made_of(result, value)
            return result
        raise ValueError(f"expected {expected(wanted)}, got {shown(value)}")
    except ValueError as error:
        report(key, str(error))
        return UNSET


def _require_sane(text: str) -> None:
    """Text that no program, file system or terminal can take is refused here, once."""
    if "\0" in text:
        raise ValueError(f"{quoted(text)} contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{quoted(text)} is not valid UTF-8") from None


def _readings(value: object) -> Iterator[object]:
    if not isinstance(value, Interpolated):
        yield value
        return
    yield str(value)
    if _INTEGER.fullmatch(value):
        yield int(value)
    if value in _LOGICAL:
        yield _LOGICAL[value]


def _measured(parse: Callable[[str], object]) -> Callable[[object], Iterator[object]]:
    """Reads text with a unit, and nothing else."""

    def readings(value: object) -> Iterator[object]:
        if isinstance(value, str):
            try:
                yield parse(value)
            except ValueError as error:
                raise ValueError(f"{error}, got {shown(value)}") from None

    return readings


_READINGS = {
    "duration": _measured(parse_duration_s),
    "size": _measured(parse_size_bytes),
    "share": _measured(parse_share),
}
