"""Durations as people write them ("250ms", "10s", "1h30m"), and sizes as they read them."""

import math
import re

_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")


def parse_duration_s(text: str) -> float:
    """Seconds in `text`: one or more numbers with units, as in "1h30m".

    Raises ValueError with what would be valid.
    """
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError('expected a duration with a unit, such as "250ms", "10s", "5m" or "1h"')
    seconds = sum(float(number) * _DURATION_UNITS_S[unit] for number, unit in parts)
    if not math.isfinite(seconds):
        raise ValueError("expected a duration that ends")
    return seconds


def duration(seconds: float) -> str:
    """`seconds` for a person, in the notation of the profile: 90 → "1m30s", 0.25 → "250ms"."""
    if 0 < seconds < 0.9995:
        return f"{round(seconds * 1000)}ms"
    if seconds < 59.95:
        return f"{seconds:.3g}s"
    rest = round(seconds)
    words = ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            words += f"{count}{unit}"
    return words


def size(size_bytes: int) -> str:
    """`size_bytes` as download pages show it: 4683074560 → "4.68 GB", 512 → "512 bytes"."""
    if size_bytes < 1000:
        return f"{size_bytes} bytes"
    scaled = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        scaled /= 1000
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
    return f"{scaled / 1000:.3g} EB"
