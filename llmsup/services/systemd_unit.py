"""The unit file of llmsup: the shipped one, with what is of this machine filled in.

Quoting as in systemd.syntax(7) and systemd.service(5).
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256

NAME = "llmsup.service"
_HEAD = "# Written by `llmsup service install`; what you change goes into a drop-in: systemctl edit"
_SEAL = re.compile(r"# Seal: ([0-9a-f]{64})\n")


def render(
    template: str,
    *,
    start: Sequence[str],
    reload: Sequence[str],
    environment: Mapping[str, str],
    user: str = "",
    group: str = "",
) -> str:
    """The unit as a sealed text: `is_untouched` tells whether it is still as it was made here.

    `environment` takes the place of the template's variables of the same names. Raises ValueError
    for a word that no unit file can hold.
    """
    fixed = {"ExecStart": _command(start), "ExecReload": _command(reload)}
    if user:
        fixed |= {"User": _word(user), "Group": _word(group)}
    lines = []
    for line in template.splitlines():
        key, _, value = line.partition("=")
        if key == "Environment" and value.partition("=")[0] in environment:
            continue
        if key in fixed:
            line = f"{key}={fixed[key]}"  # noqa: PLW2901
        lines.append(line)
        if key == "ExecReload":
            lines += [
                f"Environment={_word(f'{name}={text}')}" for name, text in environment.items()
            ]
    while lines and lines[0].startswith("#"):  # it tells how to install the template
        del lines[0]
    body = "\n".join(lines) + "\n"
    return f"{_HEAD}\n# Seal: {sha256(body.encode()).hexdigest()}\n{body}"


def is_untouched(text: str) -> bool:
    """Whether `render` made this text, and nobody has changed it since."""
    seal = _SEAL.search(text)
    return seal is not None and sha256(text[seal.end() :].encode()).hexdigest() == seal[1]


def _command(argv: Sequence[str]) -> str:
    program, *arguments = argv
    return " ".join([_word(program), *(_word(each).replace("$", "$$") for each in arguments)])


def _word(text: str) -> str:
    """One word, quoted where that is needed; "%" starts a specifier."""
    if any(ord(character) < 32 for character in text):
        raise ValueError(f"{text!r} has a control character, which no unit file can hold")
    text = text.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$~^-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
