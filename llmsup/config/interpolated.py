"""Text that was filled in: which it is, and how problems may speak of it."""

from typing import Any, Self

from msgspec import Struct
from msgspec.structs import replace


class Interpolated(str):
    """Text from `${VAR}` or `--set`. It is read as its field's type, since it cannot carry one.

    `source`: what is written in the profile, where the value of a variable is in the text. Problems
    show it in place of the value, which may be a secret.
    """

    source: str

    def __new__(cls, text: str, source: str = "") -> Self:  # noqa: D102 - construction
        made = super().__new__(cls, text)
        made.source = source
        return made


def source(text: str) -> str:
    """What to show in place of `text`; "" where it may be shown itself."""
    return text.source if isinstance(text, Interpolated) else ""


def made_of(text: str, origin: str) -> str:
    """`text`, spoken of as `origin` is, which it was made of."""
    return Interpolated(text, origin.source) if isinstance(origin, Interpolated) else text


def plain(value: Any) -> Any:
    """`value`, a struct of a profile, with plain strings: encoders take no others."""
    match value:
        case Struct():
            names = value.__struct_fields__
            return replace(value, **{name: plain(getattr(value, name)) for name in names})
        case tuple():
            return tuple(map(plain, value))
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case Interpolated():
            return str(value)
    return value
