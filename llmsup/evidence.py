"""Keeps what is known of each death: a crash bundle with `death.json` and `output.log`.

Written in a thread, so the event loop never waits for a disk; a disk that is full or cannot be
written costs the evidence and nothing else. No secret gets in: neither those that their names
give away, nor the gateway's keys, wherever they stand.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmsup.config.masking import MASK, masked, masked_variable
from llmsup.control.wire import BinaryInfo, DeathInfo, GpuInfo, MemoryInfo, PlanInfo
from llmsup.core.advice import hint
from llmsup.host import bundles, logfile, procfs
from llmsup.host.process import inherited
from llmsup.inquest import Findings, Sample
from llmsup.services.launch import Launch

log = logging.getLogger(__name__)

KEPT = 10
OUTPUT_LINES = 200
OUTPUT_MAX_BYTES = 256 * 1024
ARGUMENT_MAX_CHARS = 2000
SECRET_MIN_CHARS = 6
"""A shorter value of a variable is a word like any other: striking it out would hide too much."""


class Evidence:
    """Writes crash bundles below `directory`, one after another.

    `secrets` are struck out wherever they stand; `gpu` reads the card, None without one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        secrets: Callable[[], Collection[str]] = tuple,
        gpu: Callable[[], GpuInfo | None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._secrets = secrets
        self._gpu = gpu
        self._writer = ThreadPoolExecutor(1, "evidence")
        self._trouble = ""

    def keep(self, findings: Findings, plan: PlanInfo | None = None) -> None:
        """Have the bundle of a death written. Returns at once, and never raises for a disk.

        `plan`: what it had been given of the card.
        """
        self._writer.submit(self._keep, findings, plan)

    def _keep(self, findings: Findings, plan: PlanInfo | None) -> None:
        death = findings.death
        name = bundles.name(findings.time, findings.unit.name, death.generation)
        try:
            bundles.keep(self._directory, name, self._files(findings, plan))
            bundles.prune(self._directory, findings.unit.name, KEPT, name)
        except OSError as error:
            self._say(f"crash bundles are not being written: {error}")
        except Exception:
            log.exception("service=%s its crash bundle broke", findings.unit.name)
        else:
            self._trouble = ""

    def _files(self, findings: Findings, plan: PlanInfo | None) -> dict[str, bytes]:
        secrets = _secrets(findings.launch, self._secrets())
        info = json.dumps(_struck(_death_info(findings, self._gpu(), plan), secrets), indent=2)
        output = "".join(f"{_without(line, secrets)}\n" for line in _output(findings))
        return {
            bundles.DEATH: f"{info}\n".encode(errors="replace"),
            bundles.OUTPUT: output.encode(errors="replace"),
        }

    def _say(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning(trouble)
        self._trouble = trouble


def _output(findings: Findings) -> list[str]:
    """The last lines of this generation; the next one goes on in the same file."""
    path, end = findings.unit.log, findings.log_end
    start = findings.log_start
    if start is None:
        mark = f"--- {findings.unit.name}, generation {findings.death.generation},"
        start = logfile.after_last(path, mark, end)
    return logfile.lines_between(path, start, end, OUTPUT_LINES, OUTPUT_MAX_BYTES)


def _death_info(findings: Findings, gpu: GpuInfo | None, plan: PlanInfo | None) -> DeathInfo:
    unit, death, launch = findings.unit, findings.death, findings.launch
    status = findings.status
    return {
        "service": unit.name,
        "kind": unit.kind,
        "generation": death.generation,
        "time": findings.time,
        "lived_s": findings.lived_s,
        "cause": death.cause.value,
        "reason": death.reason,
        "hint": hint(death.cause, status.signal if status else None),
        "code": status.code if status else None,
        "signal": status.signal_name if status else None,
        "next": findings.next_step,
        "argv": masked(_cut(launch.argv)) if launch else None,
        "cwd": str(launch.cwd) if launch and launch.cwd else None,
        "env": _shown(launch) if launch else None,
        "inherited": sorted(inherited()),
        "launch": launch.digest if launch else None,
        "binary": _binary(launch.argv[0]) if launch else None,
        "model": unit.model,
        "gpu_layers": plan["gpu_layers"] if plan else unit.gpu_layers,
        "plan": plan,
        "memory": _memory(findings.memory),
        "gpu": gpu,
    }


def _memory(sample: Sample) -> MemoryInfo:
    total_bytes, available_bytes = procfs.machine_memory()
    group = sample.group
    return {
        "total_bytes": total_bytes,
        "available_bytes": available_bytes,
        "process_bytes": sample.resident_bytes or None,
        "group_bytes": group.current_bytes if group else None,
        "group_max_bytes": group.max_bytes if group else None,
        "group_oom_kills": group.oom_kills if group else None,
    }


def _binary(program: str) -> BinaryInfo | None:
    try:
        found = Path(program).stat()
    except (OSError, ValueError):  # a bare name, looked for in PATH; or a path with a NUL in it
        return None
    return {"path": program, "size_bytes": found.st_size, "modified_time": found.st_mtime}


# --- secrets


def _shown(launch: Launch) -> dict[str, str]:
    return {name: masked_variable(name, text) for name, text in _variables(launch)}


def _variables(launch: Launch) -> Iterable[tuple[str, str]]:
    return ((name, text[:ARGUMENT_MAX_CHARS]) for name, text in launch.env.items())


def _cut(argv: Iterable[str]) -> list[str]:
    """Arguments of a length that patterns can be looked for in."""
    return [argument[:ARGUMENT_MAX_CHARS] for argument in argv]


def _secrets(launch: Launch | None, keys: Collection[str]) -> list[str]:
    """What must not be written, wherever it stands: the longest first, for one may hold another."""
    variables = {**os.environ, **(launch.env if launch else {})}
    found = {
        text
        for name, text in variables.items()
        if masked_variable(name, "") == MASK and len(text) >= SECRET_MIN_CHARS
    }
    # The names of PWD and SSH_AUTH_SOCK look like those of secrets.
    found = {each for each in found if not (each.startswith("/") and os.path.lexists(each))}
    return sorted(found.union(keys), key=len, reverse=True)


def _struck(value: object, secrets: Collection[str]) -> object:
    """The same value without the secrets in any of its texts."""
    match value:
        case str():
            return _without(value, secrets)
        case list():
            return [_struck(each, secrets) for each in value]
        case dict():
            return {name: _struck(each, secrets) for name, each in value.items()}
    return value


def _without(text: str, secrets: Collection[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text
