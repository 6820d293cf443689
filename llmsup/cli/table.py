"""Aligned columns, in as much room as there is. Pure: rows and a width in, lines out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A heading, and whether what is below it are numbers."""

    title: str
    is_number: bool = False


Row = tuple[str, ...]
Paint = Callable[[int, str, str], str]
"""(column, the bare cell, the padded cell) → the cell with its colour."""


def table(columns: Sequence[Column], rows: Sequence[Row], paint: Paint | None = None) -> list[str]:
    """A line of headings, and one for each row."""
    widths = _widths(columns, rows)

    def line(cells: Row, paint: Paint | None) -> str:
        padded = [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        if paint is not None:
            padded = [paint(i, cells[i], cell) for i, cell in enumerate(padded)]
        return GAP.join(padded).rstrip()

    titles = tuple(column.title for column in columns)
    return [line(titles, None), *(line(row, paint) for row in rows)]


def fitted(
    columns: Sequence[Column],
    rows: Sequence[Row],
    width: int | None,
    *,
    elastic: Mapping[int, int],
    dispensable: Sequence[int],
) -> tuple[list[int], dict[int, int]]:
    """The columns that are shown in `width`, and how wide the elastic ones of them may be.

    `elastic`: columns that may be cut, and the least width that they are of use in.
    `dispensable`: those that a narrow terminal does without, in this order.
    """
    shown = list(range(len(columns)))
    if width is None:
        return shown, {}
    widths = _widths(columns, rows)
    least = {column: min(widths[column], room) for column, room in elastic.items()}
    for dropped in (None, *dispensable):
        shown = [column for column in shown if column != dropped]
        spare = width - len(GAP) * (len(shown) - 1)
        spare -= sum(least.get(column, widths[column]) for column in shown)
        if spare >= 0:
            break
    limits = dict(least)
    for column in elastic:
        if column in shown and spare > 0:
            grown = min(widths[column], limits[column] + spare)
            spare -= grown - limits[column]
            limits[column] = grown
    return shown, limits


def cut(cell: str, limit: int | None) -> str:
    """A text of at most `limit` characters; None: as it is."""
    if limit is None or len(cell) <= limit:
        return cell
    return f"{cell[: limit - 1]}…" if limit else ""


def painted(text: str, code: str) -> str:
    """`text` in the colour of an ANSI code; without one as it is."""
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def _widths(columns: Sequence[Column], rows: Sequence[Row]) -> list[int]:
    return [
        max(len(column.title), *(len(row[i]) for row in rows), 0)
        for i, column in enumerate(columns)
    ]
