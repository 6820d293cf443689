"""Trying an Envoy before it is trusted with anything. Each call blocks for about 0.1 s."""

import subprocess

from llmsup.errors import LaunchError

TIMEOUT_S = 20.0


def refusal(binary: str, *arguments: str) -> str:
    """What `binary` says against a configuration; empty where it accepts it.

    Raises LaunchError where there is no such program, or no answer in time.
    """
    trial = _run(binary, "--mode", "validate", "--disable-hot-restart", "-l", "error", *arguments)
    if trial.returncode == 0:
        return ""
    said = trial.stderr.decode(errors="replace").strip().splitlines()
    if not said:
        return f"it ended with status {trial.returncode}"
    return said[-1].rpartition("] ")[2]  # without time, thread and place in its source


def hot_restart_version(binary: str) -> str:
    """Envoys of the same one can take over from each other. Raises LaunchError, as `refusal`."""
    told = _run(binary, "--hot-restart-version")
    return (told.stdout or told.stderr).decode(errors="replace").strip()


def _run(binary: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [binary, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{binary} did not answer within {TIMEOUT_S:g} s") from None
    except OSError as error:
        raise LaunchError(f"cannot start {binary}: {error.strerror}") from None
