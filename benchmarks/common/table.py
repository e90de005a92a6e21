"""A plain-text table: aligned, and never wider than a terminal is taken to be. Knows columns, not figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 120
_GAP = "  "
_NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A heading, the row's key, and how its value is shown: `format` of value * `scale`."""

    heading: str
    key: str
    format: str = "{}"
    scale: float | None = None

    def cell(self, row: Mapping[str, Any]) -> str:
        """The value of one row as text; a dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return _NOTHING
        return self.format.format(value if self.scale is None else value * self.scale)

    @property
    def is_text(self) -> bool:
        """Text goes left, numbers right."""
        return self.format == "{}"


def rate(value: float) -> str:
    """A positive number to three digits or to the unit, never with an exponent: 0.021, 4.27, 128, 1,284."""
    places = 0 if value >= 100 else 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{places}f}"


def render(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], width: int = WIDTH) -> str:
    """The table. Too wide, and the first column is cut from its left, where paths differ least."""
    grid = [[column.cell(row) for column in columns] for row in rows]
    headings = [column.heading for column in columns]
    widths = [max(map(len, cells)) for cells in zip(headings, *grid, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    if excess > 0:
        widths[0] = max(len(headings[0]), widths[0] - excess, 8)
    lines = [headings, ["-" * w for w in widths], *grid]
    return "\n".join(_line(columns, cells, widths) for cells in lines)


def _line(columns: Sequence[Column], cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0] if len(cells[0]) <= widths[0] else "…" + cells[0][1 - widths[0] :]
    shown = [
        cell.ljust(width) if column.is_text else cell.rjust(width)
        for column, cell, width in zip(columns, [first, *cells[1:]], widths, strict=True)
    ]
    return _GAP.join(shown).rstrip()
