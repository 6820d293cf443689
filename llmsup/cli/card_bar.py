"""The memory of a card as one bar, and what each part of it is. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from llmsup.cli.table import GAP, painted
from llmsup.core.plan import Plan

WIDTH = 80
WIDTH_MAX = 100
MIB = 2**20

_FILLS = ("█", "▓")
_COLOURS = ("32", "36", "33", "35", "34")
"""Neighbours differ by fill, so that it can be read without colours."""
_DIM = "2"


@dataclass(frozen=True)
class Part:
    """A stretch of the card."""

    label: str
    size_bytes: int
    told: str
    fill: str
    colour: str = _DIM


def bar(plan: Plan, *, width: int | None, colour: bool) -> list[str]:
    """The bar of a plan with a card, and the lines that say what is what; sizes in MiB.

    A part that has memory has a cell, however little it is.
    """
    parts = [part for part in _parts(plan) if part.size_bytes > 0]
    room = WIDTH if width is None else min(width, WIDTH_MAX)
    cells = shares([part.size_bytes for part in parts], room)

    def paint(text: str, part: Part) -> str:
        return painted(text, part.colour if colour else "")

    stretches = zip(parts, cells, strict=True)
    drawn = "".join(paint(part.fill * count, part) for part, count in stretches)
    lines, used = [""], 0
    for part in parts:
        words = f"{part.fill} {part.label} {part.told}"
        if used and used + len(GAP) + len(words) > room:
            lines.append("")
            used = 0
        gap = GAP if used else ""
        lines[-1] += gap + paint(part.fill, part) + words.removeprefix(part.fill)
        used += len(gap) + len(words)
    return [drawn, *lines]


def shares(sizes: Sequence[int], room: int) -> list[int]:
    """`room` cells shared out by size: at least one each, the largest gives where that is less."""
    total = sum(sizes)
    exact = [size * room / total for size in sizes]
    cells = [max(1, int(each)) for each in exact]
    by_rest = sorted(range(len(sizes)), key=lambda i: exact[i] - cells[i], reverse=True)
    for i in by_rest[: max(0, room - sum(cells))]:
        cells[i] += 1
    while sum(cells) > room and max(cells) > 1:
        cells[cells.index(max(cells))] -= 1
    return cells


def mib(size_bytes: int) -> str:
    """A size in MiB, without the unit."""
    return f"{size_bytes / MIB:.0f}"


def taken(size_bytes: int) -> str:
    """The same of what something takes, rounded up, as the reasons of a plan have it."""
    return str(-(-size_bytes // MIB))


def free(size_bytes: int) -> str:
    """The same of what is free, rounded down."""
    return str(size_bytes // MIB)


def _parts(plan: Plan) -> list[Part]:
    """The card from left to right; what was refused is not on it."""
    budget = plan.budget
    if budget is None:
        return []
    looks = zip(cycle(_FILLS), cycle(_COLOURS), strict=False)
    on_card = [
        each
        for each in plan.placements
        if each.price.device_bytes > 0 and each.service not in plan.refused
    ]
    left_bytes = budget.usable_bytes - sum(each.price.device_bytes for each in on_card)
    models = [
        Part(each.service, each.price.device_bytes, taken(each.price.device_bytes), *look)
        for each, look in zip(on_card, looks, strict=False)
    ]
    kept_bytes = budget.free_bytes - budget.usable_bytes - budget.reserved_bytes
    others_bytes = budget.total_bytes - budget.free_bytes
    rule = "headroom" if kept_bytes <= budget.headroom_bytes else "above the ceiling"
    return [
        *models,
        Part("left", left_bytes, free(left_bytes), "░"),
        Part("reserved", budget.reserved_bytes, taken(budget.reserved_bytes), "▒"),
        Part(rule, kept_bytes, mib(kept_bytes), "▒"),
        Part("other programs", others_bytes, mib(others_bytes), "·"),
    ]
