"""`${VAR}` and `${VAR:-default}` in the strings of a profile; `$$` is a dollar sign."""

import re
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET

from llmsup.config.decode import Report
from llmsup.config.interpolated import Interpolated
from llmsup.config.wording import Key, quoted

_DOLLAR = re.compile(
    r"\$(?:(?P<dollar>\$)"
    r"|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}"
    r"|(?P<brace>\{)"
    r"|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))"
)


def interpolate(value: Any, variables: Mapping[str, str], key: Key, report: Report) -> Any:
    """`value` with the variables of every string in it filled in.

    A string whose variables cannot be filled in is reported and becomes UNSET. Raises
    RecursionError where tables or arrays are nested without end.
    """
    if isinstance(value, dict):
        return {
            name: interpolate(item, variables, (*key, name), report) for name, item in value.items()
        }
    if isinstance(value, list):
        return [
            interpolate(item, variables, (*key, position), report)
            for position, item in enumerate(value)
        ]
    if not isinstance(value, str) or "$" not in value:
        return value
    try:
        return filled_in(value, variables)
    except ValueError as error:
        report(key, str(error))
        return UNSET


def filled_in(text: str, variables: Mapping[str, str]) -> str:
    """`text` with its variables filled in; an Interpolated where there was one.

    Raises ValueError naming the variable that is not set, or what would be valid.
    """
    has_value = False

    def value_of(match: re.Match[str]) -> str:
        nonlocal has_value
        if match["dollar"]:
            return "$"
        if match["brace"]:
            raise ValueError(
                f'{quoted(text)}: expected "${{NAME}}" or "${{NAME:-default}}" ("$$" is a "$")'
            )
        if name := match["bare"]:
            raise ValueError(f'{quoted(text)}: write "${{{name}}}" for the variable, "$$" for "$"')
        name, default = match["name"], match["default"]
        if default is not None:
            default = _default(name, default)
        value = variables.get(name)
        if value or (value is not None and default is None):
            has_value = True
            return value
        if default is None:
            raise ValueError(f'${{{name}}} is not set; set it or write "${{{name}:-default}}"')
        return default

    result = _DOLLAR.sub(value_of, text)
    has_variable = any(match["name"] for match in _DOLLAR.finditer(text))
    if not has_variable and not isinstance(text, Interpolated):
        return result
    return Interpolated(result, source=str(text) if has_value else "")


def _default(name: str, written: str) -> str:
    if any(match["dollar"] is None for match in _DOLLAR.finditer(written)):
        raise ValueError(
            f'${{{name}:-…}}: a default cannot contain another variable ("$$" is a "$")'
        )
    return written.replace("$$", "$")
