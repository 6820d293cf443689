"""Asking systemd: systemctl and loginctl, for the machine's service manager or our own."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from llmsup.errors import LlmsupError

ASK_TIMEOUT_S = 10.0
_KERNEL = Path("/proc/sys/kernel/osrelease")


class Systemctl:
    """One service manager: that of the machine (`is_system`), or that of this user."""

    def __init__(self, *, is_system: bool) -> None:
        self._command = ["systemctl"] if is_system else ["systemctl", "--user"]

    def said(self, *words: str) -> str:
        """The command as a person would type it."""
        return " ".join([*self._command, *words])

    def answers(self) -> bool:
        """Whether there is such a service manager, and we may speak to it."""
        return _ask([*self._command, "show", "--property=Version"]) is not None

    def do(self, *words: str) -> None:
        """Run a verb for as long as it takes. Raises LlmsupError with what systemctl said."""
        try:
            done = subprocess.run(
                [*self._command, *words],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError as error:
            raise LlmsupError(f"cannot run {self.said(*words)}: {error.strerror}") from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise LlmsupError(f"{self.said(*words)}: {said[0]}", hint=" ".join(said[1:]))

    def properties(self, unit: str, names: Sequence[str]) -> dict[str, str]:
        """Properties of a unit; none where systemd does not tell."""
        text = _ask([*self._command, "show", unit, f"--property={','.join(names)}"]) or ""
        pairs = (line.partition("=") for line in text.splitlines())
        return {name: value for name, _, value in pairs}


def lingers(user: str) -> bool | None:
    """Whether the user's services go on without a login session; None where nobody tells."""
    text = _ask(["loginctl", "show-user", user, "--property=Linger"])
    if text is None:
        # logind does not know users that are not logged in, and keeps the answer as a file.
        return Path("/var/lib/systemd/linger", user).exists() if _has_logind() else None
    return text.strip() == "Linger=yes"


def is_wsl() -> bool:
    """Whether this is a machine of the Windows Subsystem for Linux."""
    try:
        return "microsoft" in _KERNEL.read_text().lower()
    except OSError:
        return False


def _has_logind() -> bool:
    return _ask(["loginctl", "list-users"]) is not None


def _ask(command: Sequence[str]) -> str | None:
    """What it printed; None where it failed or there is no such program."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=ASK_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
