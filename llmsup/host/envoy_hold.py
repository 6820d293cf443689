"""Whether an Envoy can run the hold filter: it is asked once, and the answer is kept in a file.

Some builds come without Wasm, and one of those would reject every cluster that has the filter.
"""

import hashlib
import logging
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec

from llmsup.host.envoy_trial import refusal
from llmsup.host.replace import fingerprint, replace_file
from llmsup.services import envoy_clusters

log = logging.getLogger(__name__)


class _Answer(msgspec.Struct, frozen=True):
    """What a program said about a filter; another of either has to be asked itself."""

    program: str
    holds: bool


@cache
def module() -> bytes:
    """The assembled hold filter."""
    return (files("llmsup.services") / "hold.wasm").read_bytes()


def is_known_to_hold(binary: str, answer: Path) -> bool:
    """Whether `binary` was asked by `learn`, and said yes."""
    known = _read(binary, answer)
    return known is not None and known.holds


def learn(binary: str, answer: Path) -> None:
    """Ask `binary`, unless the file `answer` has it. Blocks for about 0.1 s.

    Raises LaunchError where there is no such program, or no answer in time.
    """
    if _read(binary, answer) is not None:
        return
    trial = msgspec.json.encode(envoy_clusters.hold_trial(module())).decode()
    said = refusal(binary, "--config-yaml", trial)
    if said:
        log.info("streams are not held, this Envoy has no Wasm: %s", said)
    content = msgspec.json.encode(_Answer(_identity(binary), holds=not said))
    try:
        replace_file(answer, answer.with_suffix(".new"), content)
    except OSError as error:
        log.info("streams are not held: %s cannot be written: %s", answer, error.strerror)


def _read(binary: str, answer: Path) -> _Answer | None:
    try:
        found = msgspec.json.decode(answer.read_bytes(), type=_Answer)
    except (OSError, ValueError):
        return None
    return found if found.program == _identity(binary) else None


def _identity(binary: str) -> str:
    essence = repr((binary, fingerprint(Path(binary)), module()))
    return hashlib.sha256(essence.encode(errors="surrogateescape")).hexdigest()
