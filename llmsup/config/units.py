"""Quantities as people write them: "250ms", "10s", "1h30m"; "256MiB", "1.5GiB"; "95%"."""

import math
import re
from dataclasses import dataclass

_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_SIZE_UNITS_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(B|KiB|MiB|GiB|TiB)")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a whole: so many bytes, or where `percent` is set so much of whatever there is."""

    size_bytes: int = 0
    percent: float | None = None

    def of(self, whole_bytes: int) -> int:
        """The part, in bytes; never more than the whole."""
        if self.percent is None:
            return min(self.size_bytes, whole_bytes)
        return int(whole_bytes * self.percent / 100)

    def __str__(self) -> str:
        """As in the notation of the profile."""
        if self.percent is None:
            return size(self.size_bytes)
        return f"{self.percent:.6f}".rstrip("0").rstrip(".") + "%"


def parse_share(text: str) -> Share:
    """A percentage above 0 and up to 100, or a size. Raises ValueError with what would be valid."""
    if match := _PERCENT.fullmatch(text):
        if 0 < float(match[1]) <= 100:
            return Share(percent=float(match[1]))
        raise ValueError("expected a share above 0% and up to 100%")
    if _SIZE.fullmatch(text) and (size_bytes := parse_size_bytes(text)):
        return Share(size_bytes)
    raise ValueError('expected a share such as "95%", or a size such as "5600MiB"')


def parse_size_bytes(text: str) -> int:
    """Bytes in `text`, a number with a unit; rounded down to whole ones.

    Raises ValueError with what would be valid.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError('expected a size with a unit, such as "512KiB", "10MiB" or "1.5GiB"')
    return int(float(match[1]) * _SIZE_UNITS_BYTES[match[2]])


def size(size_bytes: int) -> str:
    """`size_bytes` in the notation of the profile, in the largest unit that leaves no fraction."""
    if not size_bytes:
        return "0B"
    units = _SIZE_UNITS_BYTES.items()
    factor, unit = max((factor, unit) for unit, factor in units if size_bytes % factor == 0)
    return f"{size_bytes // factor}{unit}"


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


def shown_size(size_bytes: int) -> str:
    """`size_bytes` as download pages show it: 4683074560 → "4.68 GB", 512 → "512 bytes"."""
    if size_bytes < 1000:
        return f"{size_bytes} bytes"
    scaled = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        scaled /= 1000
        if scaled < 999.5:
            return f"{scaled:.3g} {unit}"
    return f"{scaled / 1000:.3g} EB"
