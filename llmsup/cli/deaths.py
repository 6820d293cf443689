"""Deaths, as text for a person. Pure: what bundles hold and a width in, lines out."""

import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo

from llmsup.cli import render
from llmsup.cli.table import cut
from llmsup.control.wire import GpuInfo, KeptDeath, MemoryInfo, ServiceInfo

LABEL_WIDTH = 8
INDENT = "  "
WRAP_MIN_WIDTH = 20
SAID_LINES = 5


def account(
    service: str,
    info: ServiceInfo | None,
    deaths: Sequence[KeptDeath],
    kept: int,
    *,
    width: int | None = None,
    colour: bool = False,
    zone: tzinfo | None = None,
) -> str:
    """`llmsup why`: how the service is, then its last deaths, the newest first, of `kept` ones.

    `info` is None while no daemon keeps the service.
    """
    head = _wrapped(_present(service, info, deaths), "", width)
    if not kept:
        return "\n".join([*head, f"no death of {service} is kept"])
    blocks = [_block(death, width, colour, zone) for death in deaths]
    if len(deaths) < kept:
        head.append(f"{len(deaths)} of {render.count(kept, 'death')} that are kept, newest first")
    return "\n\n".join("\n".join(block) for block in (head, *blocks))


def _present(service: str, info: ServiceInfo | None, deaths: Sequence[KeptDeath]) -> str:
    if info is None:
        return f"{service}: no daemon keeps it at present"
    details = [f"generation {info['generation']}"]
    if info["pid"] is not None:
        details.append(f"pid {info['pid']}")
    if info["uptime_s"] is not None:
        details.append(f"up {render.age(info['uptime_s'])}")
    # What the last death was is told below.
    last = deaths[0]["reason"] if deaths else ""
    why = render.cleaned(info["why"].removeprefix(last).removeprefix("; "))
    return f"{service} is {info['state']} ({', '.join(details)})" + (f": {why}" if why else "")


def _block(death: KeptDeath, width: int | None, colour: bool, zone: tzinfo | None) -> list[str]:
    moment = datetime.fromtimestamp(death["time"], UTC).astimezone(zone)
    title = f"{moment:%Y-%m-%d %H:%M:%S}  {death['cause']}"
    lines = [f"\x1b[1m{title}\x1b[0m" if colour else title]
    for label, text in (
        ("how", death["reason"]),
        ("lived", _lived(death)),
        ("then", death["next"]),
        ("hint", death["hint"]),
        ("memory", _memory(death["memory"])),
        ("gpu", _gpu(death["gpu"])),
        ("plan", death["plan"]["reason"] if death["plan"] else ""),
    ):
        lines += _wrapped(render.cleaned(text), label, width) if text else []
    said = [render.cleaned(line) for line in death["output"][-SAID_LINES:]]
    for label, line in zip(["said", *[""] * SAID_LINES], said, strict=False):
        lines.append(cut(f"{INDENT}{label:<{LABEL_WIDTH}}{line}", width))
    # Never cut: it is there to be copied.
    return [*lines, f"{INDENT}{'kept in':<{LABEL_WIDTH}}{death['bundle']}"]


def _lived(death: KeptDeath) -> str:
    lived_s = death["lived_s"]
    if lived_s is None:
        return f"not at all (generation {death['generation']})"
    return f"{render.span(lived_s)} (generation {death['generation']})"


def _memory(memory: MemoryInfo) -> str:
    parts = []
    if memory["process_bytes"] is not None:
        parts.append(f"{_size(memory['process_bytes'])} its own")
    if memory["group_max_bytes"] is not None and memory["group_bytes"] is not None:
        used, limit = _size(memory["group_bytes"]), _size(memory["group_max_bytes"])
        parts.append(f"{used} of {limit} used by its control group")
    if memory["total_bytes"]:
        left, total = _size(memory["available_bytes"]), _size(memory["total_bytes"])
        parts.append(f"{left} of {total} left on the machine")
    return " · ".join(parts)


def _size(size_bytes: int) -> str:
    """Memory of a machine: "173 MiB", "23.5 GiB"."""
    gibibytes = size_bytes / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else render.mebibytes(size_bytes)


def _gpu(gpu: GpuInfo | None) -> str:
    if gpu is None:
        return ""
    free, total = render.mebibytes(gpu["free_bytes"]), render.mebibytes(gpu["total_bytes"])
    return f"{free} of {total} free on {gpu['name']}"


def _wrapped(text: str, label: str, width: int | None) -> list[str]:
    """A text behind its label, as many lines as it takes; one where there is no end to a line."""
    margin = f"{INDENT}{label:<{LABEL_WIDTH}}" if label else ""
    if width is None:
        return [margin + text]
    return textwrap.wrap(
        text,
        max(width, len(margin) + WRAP_MIN_WIDTH),
        initial_indent=margin,
        subsequent_indent=" " * len(margin),
    )
