"""How problems speak of keys, values and choices: TOML's notation, and never a screenful."""

import difflib
import re
from collections.abc import Iterable

from llmsup.config.interpolated import source

Key = tuple[str | int, ...]
"""Where a value stands in a profile: table keys, and positions in arrays."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")
_SHOWN_LENGTH = 60
_SHOWN_INTEGER = 10**18
_LISTED = 40
_NAMED = 400


def dotted(key: Key) -> str:
    """`key` as TOML writes it: `route."gpt 4".services[1]`."""
    words = ""
    for part in key:
        if isinstance(part, int):
            words += f"[{part}]"
        else:
            words += f".{part}" if _BARE_KEY.fullmatch(part) else f".{quoted(part)}"
    return words.removeprefix(".")


def quoted(text: str) -> str:
    """`text` on one line, in double quotes, cut where it is long; never a variable's value."""
    return _by_source(text) or f'"{_short(text)}"'


def named(text: str) -> str:
    """A path or an address as it is, unless it is none; never a variable's value."""
    return _by_source(text) or (text if len(text) <= _NAMED else f"{text[:_NAMED]}…")


def shown(value: object) -> str:
    """`value` as it stands in the profile; arrays and tables by their kind only."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return quoted(value)
        case int():
            return str(value) if abs(value) < _SHOWN_INTEGER else "a huge integer"
        case list():
            return "an array"
        case dict():
            return "a table"
        case _:
            return str(value)


def choices(words: Iterable[str]) -> str:
    """The valid words: `"dual" or "single"`."""
    *most, last = map(quoted, words)
    return f"{', '.join(most)} or {last}" if most else last


def suggestion(word: str, known: Iterable[str]) -> str:
    """The known word nearest to `word`, or all that are known."""
    names = list(known)
    if near := difflib.get_close_matches(word, names, n=1):
        return f"did you mean {quoted(near[0])}?"
    if not names:
        return "none is valid here"
    rest = ", …" if len(names) > _LISTED else ""
    return f"valid here: {', '.join(dotted((name,)) for name in names[:_LISTED])}{rest}"


def one_line(text: str) -> str:
    """`text` with whatever does not print, line ends above all, as escapes."""
    return "".join(c if c.isprintable() else _unprinted(c) for c in text)


def _by_source(text: str) -> str:
    written = source(text)
    return written and f"the value of {_short(written)}"


def _short(text: str) -> str:
    short = text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"
    return "".join(map(_escaped, short))


def _escaped(character: str) -> str:
    if character in {'"', "\\"}:
        return f"\\{character}"
    return character if character.isprintable() else _unprinted(character)


def _unprinted(character: str) -> str:
    return character.encode("unicode_escape").decode()
