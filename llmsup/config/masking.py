"""Values that are not shown: what the words around them say is a secret."""

import re
from collections.abc import Iterable

MASK = "***"

_VARIABLE_PART = r"(?:KEY|TOKEN|SECRET|PASS|PWD|AUTH|CREDENTIAL)"
_WORD = (
    r"(?:(?:api|access|auth|hf|private|secret)?(?:key|token)"
    r"|secret|pass(?:word|wd|phrase)?|pwd|auth(?:orization)?|credentials?|cookie)"
)
# The last word of the name, so that --max-tokens and --tokenizer are none.
_FLAG_NAME = rf"(?:-hft|--?(?:[a-z0-9]+[-_])*{_WORD})"
_VARIABLE_NAME = rf"[a-z0-9_]*{_VARIABLE_PART}[a-z0-9_]*"

_VARIABLE = re.compile(_VARIABLE_PART, re.IGNORECASE)
_FLAG = re.compile(_FLAG_NAME, re.IGNORECASE)
_ASSIGNMENT = re.compile(
    rf"(?P<name>(?:{_FLAG_NAME}|{_VARIABLE_NAME})=).+", re.IGNORECASE | re.DOTALL
)
_WITHIN = re.compile(
    rf"""(?P<name>(?<![\w-])(?:{_FLAG_NAME}(?:=|\s+)|{_VARIABLE_NAME}=))"""
    r"""(?:"[^"]*"|'[^']*'|\S+)""",
    re.IGNORECASE,
)
_HEADER = re.compile(
    rf"""(?P<name>\b(?:[a-z0-9]+[-_])*{_WORD}["']?\s*:\s*["']?)[^"'\s][^"']*""", re.IGNORECASE
)
_URL_USER = re.compile(r"""(?P<name>[a-z][a-z0-9+.-]*://)[^\s/?#"']*(?=@)""", re.IGNORECASE)


def masked_variable(name: str, value: str) -> str:
    """The value of an environment variable as it may be shown."""
    return MASK if _VARIABLE.search(name) else _mask(_URL_USER, value)


def masked(argv: Iterable[str]) -> list[str]:
    """A command line as it may be shown; an argument may be a command line itself (`sh -c`)."""
    shown: list[str] = []
    previous = ""
    for argument in argv:
        shown.append(MASK if _FLAG.fullmatch(previous) else _argument(argument))
        previous = argument
    return shown


def _argument(text: str) -> str:
    if assignment := _ASSIGNMENT.fullmatch(text):
        return assignment["name"] + MASK
    for pattern in (_WITHIN, _HEADER, _URL_USER):
        text = _mask(pattern, text)
    return text


def _mask(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: match["name"] + MASK, text)
