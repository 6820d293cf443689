"""The unit file: filled in, quoted as systemd wants it, sealed."""

import pytest

from llmsup.services.systemd_unit import is_untouched, render

TEMPLATE = """# how to install this
[Service]
User=nobody
ExecStart=/x start
ExecReload=/x reload
Environment=PATH=/bin
Environment=LLMSUP_HOME=%S/llmsup
"""


def rendered(
    start: tuple[str, ...] = ("/bin/llmsup", "start"),
    environment: dict[str, str] | None = None,
    user: str = "",
) -> list[str]:
    text = render(
        TEMPLATE,
        start=start,
        reload=("/bin/llmsup", "reload"),
        environment=environment or {},
        user=user,
        group=user,
    )
    assert is_untouched(text)
    return text.splitlines()


def test_what_is_of_this_machine_is_filled_in() -> None:
    assert rendered(environment={"LLMSUP_HOME": "/srv/x"}, user="me")[2:] == [
        "[Service]",
        "User=me",
        "ExecStart=/bin/llmsup start",
        "ExecReload=/bin/llmsup reload",
        "Environment=LLMSUP_HOME=/srv/x",
        "Environment=PATH=/bin",
    ]


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/a b", '"/a b"'),
        ("/100%", "/100%%"),
        ("/$HOME", "/$$HOME"),
        ('/"', '"/\\""'),
        ("/\\", '"/\\\\"'),
        ("/é", '"/é"'),
        (";", '";"'),
    ],
)
def test_words_are_quoted(word: str, written: str) -> None:
    assert f"ExecStart=/bin/llmsup {written}" in rendered(start=("/bin/llmsup", word))


def test_a_variable_is_quoted_and_nothing_in_it_is_expanded() -> None:
    lines = rendered(environment={"LLMSUP_HOME": "/a b/100%/$x"})
    assert 'Environment="LLMSUP_HOME=/a b/100%%/$x"' in lines


def test_a_line_break_cannot_add_a_line() -> None:
    with pytest.raises(ValueError, match="control character"):
        rendered(start=("/bin/llmsup", "x\nExecStart=/bin/sh"))


@pytest.mark.parametrize(
    ("old", "new"), [("/bin", "/sbin"), ("# Seal: ", "# seal: "), ("]", "]\n")]
)
def test_an_edit_breaks_the_seal(old: str, new: str) -> None:
    text = "\n".join(rendered()) + "\n"
    assert is_untouched(text)
    assert not is_untouched(text.replace(old, new))
