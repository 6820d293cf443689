"""What the daemon said, as text for a person. Pure: snapshots and a width in, lines out."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo

from llmsup.cli.table import GAP, Column, Row, cut, fitted, painted, table
from llmsup.control.wire import EventInfo, GpuInfo, ServiceInfo, Status, UpstreamsInfo

_COLOURS = {
    "ready": "32",
    "starting": "33",
    "unready": "33",
    "draining": "33",
    "stopping": "33",
    "backoff": "31",
    "failed": "31",
    "stopped": "2",
}
_BOLD = "1"
_YELLOW = "33"
_SPANS = (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))

_SERVICE_COLUMNS = (
    Column("SERVICE"),
    Column("STATE"),
    Column("MODEL"),
    Column("LAYERS", is_number=True),
    Column("VRAM", is_number=True),
    Column("PORT", is_number=True),
    Column("RESTARTS", is_number=True),
    Column("UPTIME", is_number=True),
    Column("WHY"),
)
_STATE, _MODEL, _LAYERS, _VRAM, _RESTARTS, _WHY = 1, 2, 3, 4, 6, 8
_ELASTIC = {_MODEL: 12, _WHY: 10}
_DISPENSABLE = (_WHY, _VRAM, _LAYERS, _RESTARTS)
"""What a narrow terminal does without, in this order; a reason then stands below the table."""
_UPSTREAM_COLUMNS = (Column("ROUTE"), Column("DESIRED"), Column("PUBLISHED"), Column("ENVOY HAS"))


# --- whole answers ------------------------------------------------------------------------------


def status(snapshot: Status, *, width: int | None = None, colour: bool = False) -> str:
    """`llmsup status`: a header line, one for the card, the table, and what else is wrong."""
    shown = services(snapshot["services"], width=width, colour=colour)
    head = [header(snapshot)]
    if snapshot["gpu"] is not None:
        head.append(card(snapshot["gpu"]))
    elif any(_may_use_card(info) for info in snapshot["services"]):
        words = f"no GPU: {cleaned(snapshot['gpu_why'])}"
        head.append(painted(words, _YELLOW if colour else ""))
    troubles = snapshot["daemon"].get("troubles", [])  # none are told by an older daemon
    warnings = [f"warning: {cleaned(trouble)}" for trouble in troubles]
    return "\n".join([*head, "", shown, *([""] if warnings else []), *warnings])


def header(snapshot: Status) -> str:
    """The stack in one line."""
    daemon = snapshot["daemon"]
    parts = [
        daemon["profile"],
        f"daemon pid {daemon['pid']}",
        "stopping" if daemon["stopping"] else f"up {age(daemon['uptime_s'])}",
        address(snapshot),
    ]
    return " · ".join(parts)


def card(gpu: GpuInfo) -> str:
    """The card and its memory: "RTX 4050 Laptop GPU · 3.2 of 6.0 GiB free"."""
    name = cleaned(gpu["name"]).removeprefix("NVIDIA ").removeprefix("GeForce ")
    free, total = gpu["free_bytes"] / 2**30, gpu["total_bytes"] / 2**30
    return f"{name} · {free:.1f} of {total:.1f} GiB free"


def address(snapshot: Status) -> str:
    """The base URL for OpenAI clients."""
    return f"http://{snapshot['gateway']}/v1"


def services(
    infos: Sequence[ServiceInfo], *, width: int | None = None, colour: bool = False
) -> str:
    """The table of services, at most `width` wide; reasons that were cut follow it in full."""
    rows = [_service_row(info) for info in infos]
    shown, limits = fitted(
        _SERVICE_COLUMNS, rows, width, elastic=_ELASTIC, dispensable=_DISPENSABLE
    )

    def paint(column: int, cell: str, padded: str) -> str:
        return painted(padded, _COLOURS.get(cell, "")) if shown[column] == _STATE else padded

    lines = table(
        [_SERVICE_COLUMNS[column] for column in shown],
        [tuple(cut(row[column], limits.get(column)) for column in shown) for row in rows],
        paint if colour else None,
    )
    if colour:
        lines[0] = painted(lines[0], _BOLD)
    why_width = limits.get(_WHY) if _WHY in shown else 0
    rest = [f"{row[0]}: {row[_WHY]}" for row in rows if cut(row[_WHY], why_width) != row[_WHY]]
    return "\n".join([*lines, "", *rest] if rest else lines)


def upstreams(infos: Sequence[UpstreamsInfo]) -> str:
    """The table of upstream lists."""
    rows = [
        (
            info["route"],
            _listed(info["desired"]),
            _listed(info["published"]),
            "not known" if info["confirmed"] is None else _listed(info["confirmed"]),
        )
        for info in infos
    ]
    return "\n".join(table(_UPSTREAM_COLUMNS, rows))


def event(info: EventInfo, zone: tzinfo | None = None, *, width: int = 0) -> str:
    """One line of `llmsup events`, in local time or that of `zone`; names padded to `width`."""
    moment = _moment(info, zone)
    stamp = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
    name = f"{cleaned(subject(info)):<{width}}"
    told = (cleaned(_news(info)), cleaned(_why(info)))
    return GAP.join(part for part in (stamp, name, *told) if part)


def day(info: EventInfo, zone: tzinfo | None = None) -> str:
    """The day of an event, as the line above the first of that day."""
    return f"{_moment(info, zone):%Y-%m-%d}"


def subject(info: EventInfo) -> str:
    """What an event is about: a service, a route, the card, or the daemon."""
    whole = "card" if info["event"] == "card" else "daemon"
    return info.get("service") or info.get("route") or whole


def changes(before: Mapping[str, str], infos: Sequence[ServiceInfo], elapsed_s: float) -> list[str]:
    """A line for each service whose state is not the one in `before`."""
    name_width = max((len(info["service"]) for info in infos), default=0)
    lines = []
    for info in infos:
        if before.get(info["service"]) != info["state"]:
            name = f"{info['service']:<{name_width}}"
            parts = (name, f"{info['state']:<8}", f"{elapsed_s:6.1f}s", cleaned(info["why"]))
            lines.append(GAP.join(parts).rstrip())
    return lines


# --- values -------------------------------------------------------------------------------------


def age(seconds: float) -> str:
    """A time span in its two largest units: "12s", "3m05s", "2h10m", "4d07h"."""
    rest = int(seconds)
    for large, size_s, small, step_s in _SPANS:
        if rest >= size_s:
            return f"{rest // size_s}{large}{rest % size_s // step_s:02d}{small}"
    return f"{rest}s"


def span(seconds: float) -> str:
    """A time span like `age`; a short one with tenths of seconds: "0.4s"."""
    return f"{seconds:.1f}s" if seconds < 10 else age(seconds)


def mebibytes(size_bytes: int) -> str:
    """A size as GPU tools show it: "1945 MiB"."""
    return f"{size_bytes / 2**20:.0f} MiB"


def model_name(file: str) -> str:
    """The name of a model file as a person knows it."""
    return cleaned(file.rpartition("/")[2].removesuffix(".gguf"))


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 service", "3 services"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"


def cleaned(text: str) -> str:
    """Without control characters: a reason may quote what a process wrote to its log."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


# --- inside -------------------------------------------------------------------------------------


def _service_row(info: ServiceInfo) -> Row:
    model, port, uptime_s = info["model"], info["port"], info["uptime_s"]
    return (
        info["service"],
        info["state"],
        "-" if model is None else model_name(model),
        _layers(info),
        _vram(info["planned_bytes"], info["measured_bytes"]),
        "-" if port is None else str(port),
        str(info["restarts"]),
        "-" if uptime_s is None else age(uptime_s),
        cleaned(info["why"]),
    )


def _may_use_card(info: ServiceInfo) -> bool:
    """Whether its profile asks for layers; one that a plan was made for may have got none."""
    return info["gpu_layers"] not in {None, 0} or info.get("layers") is not None


def _layers(info: ServiceInfo) -> str:
    """Those on the card, of all: "19/29"; what the profile says while nothing is planned."""
    asked, layers = info["gpu_layers"], info.get("layers")  # an older daemon does not tell
    if asked is None:
        return "-"
    return str(asked) if layers is None or isinstance(asked, str) else f"{asked}/{layers}"


def _vram(planned_bytes: int | None, measured_bytes: int | None) -> str:
    """Planned against measured: "3.2/3.3 GiB"; what is planned while it loads; "-": nothing."""
    known = [size for size in (planned_bytes, measured_bytes) if size is not None]
    return f"{'/'.join(f'{size / 2**30:.1f}' for size in known)} GiB" if any(known) else "-"


def _moment(info: EventInfo, zone: tzinfo | None) -> datetime:
    return datetime.fromtimestamp(info["time"], UTC).astimezone(zone)


def _news(info: EventInfo) -> str:
    if "state" in info:
        before, state = info.get("before"), info["state"]
        if before == state:  # a death that was answered by a spawn at once
            return f"{state} (generation {info.get('generation', '?')})"
        return f"{before} → {state}" if before else state
    if "upstreams" in info:
        return f"upstreams: {_listed(info['upstreams'])}"
    if info["event"] == "death":
        lived_s = info.get("lived_s")
        after = "" if lived_s is None else f" after {span(lived_s)}"
        return f"death of generation {info.get('generation', '?')}{after}"
    return "" if info["event"] in {"daemon", "card"} else info["event"]


def _why(info: EventInfo) -> str:
    if "elapsed_ms" in info:
        return f"(confirmed in {info['elapsed_ms']:.1f} ms)"
    if info["event"] == "death":  # its reason stands in the change of state beside it
        return f"{info.get('cause', '')}; {info.get('next', '')}"
    return info.get("why", "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "-"
