"""Medians and ratios, printed as aligned lines."""

import statistics
from collections.abc import Sequence

NONE = "       -    nothing was measured"


def spread(values_s: Sequence[float]) -> str:
    """Median, and the range around it, in milliseconds."""
    if not values_s:
        return NONE
    low, middle, high = min(values_s), statistics.median(values_s), max(values_s)
    rest = f"({low * 1000:.1f} to {high * 1000:.1f}, n={len(values_s)})"
    return f"{middle * 1000:8.1f} ms median  {rest}"


def line(label: str, text: str) -> None:
    print(f"  {label:<34} {text}")


def verdict(label: str, value: float, limit: float, unit: str) -> bool:
    """Print whether `value` is within `limit`; returns that."""
    holds = value <= limit
    word = "holds" if holds else "BROKEN"
    line(label, f"{value:8.2f} {unit}  limit {limit:g} {unit}  {word}")
    return holds
