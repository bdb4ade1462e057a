"""Text tables for the terminal, laid out by rich: aligned columns, and no borders, colours or markup.

A table is as wide as its cells and never wraps them: each row is one line, which can be searched and cut, in a pipe as
on a terminal. Whoever needs a narrower table gives columns a width, or fewer of them.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

GAP = 2
"""Characters between two columns."""
_UNLIMITED = 1_000_000
"""Characters of a line: more than any row has."""


class Column(NamedTuple):
    """How a column is laid out."""

    right: bool = False
    """Aligned to the right, as numbers are."""
    width: int | None = None
    """Characters; a longer text is cut, and ends in an ellipsis. None: as wide as the widest cell."""
    min_width: int = 0
    """Characters that it has at least, so that tables below each other line up."""


LEFT, RIGHT = Column(), Column(right=True)


def table_lines(rows: Sequence[Sequence[str]], columns: Sequence[Column], gap: int = GAP) -> list[str]:
    """Return one line for each row, without spaces at its end. A row may have fewer cells than there are columns."""
    # rich takes 0.1 s to import, which only a command that prints a table should cost.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, gap, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        grid.add_column(justify=justify, width=column.width, min_width=column.min_width, no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(_one_line(cell)) for cell in row))
    output = io.StringIO()
    console = Console(file=output, width=_UNLIMITED, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(grid)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def _one_line(cell: str) -> str:
    """Show what would break the line as an escape sequence."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in cell)
