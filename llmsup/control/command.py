"""How the daemon is called: by the command line, and by the daemon that it takes the place of."""

import logging
import sys
from collections.abc import Mapping, Sequence

from llmsup.errors import UsageError


def daemon_argv(profile: str, overrides: Sequence[str]) -> list[str]:
    """The command that is the daemon. Nothing of the working directory is imported (-P)."""
    argv = [sys.executable, "-P", "-m", "llmsup.daemon", "--profile", profile]
    return argv + [word for override in overrides for word in ("--set", override)]


def log_level(environ: Mapping[str, str]) -> str:
    """The level that LLMSUP_LOG asks for, as logging names it. Raises UsageError."""
    level = environ.get("LLMSUP_LOG") or "info"
    if level.upper() not in logging.getLevelNamesMapping():
        raise UsageError(
            f"LLMSUP_LOG is {level}, which is no level", hint="one of debug, info, warning, error"
        )
    return level.upper()
