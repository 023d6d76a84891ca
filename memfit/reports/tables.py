"""Tables for the terminal that show names unchanged."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from memfit.records import Source

__all__ = ["cards_table", "plain_table"]

# That of a usual name. Some cards have twice as long a one, which takes two lines.
_NAME_WIDTH = len("NVIDIA GeForce RTX 2080 Ti")


class _PlainTable(Table):
    """A table with plain text in its cells. Rich would read `[item]` as markup and drop it."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; cells that are strings are shown unchanged."""
        shown = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, **options)


def plain_table(*columns: str, has_header: bool = True) -> Table:
    """Return a table without lines, as in every report.

    Args:
        *columns: Names of columns that are aligned to the left.
        has_header: Show the names of the columns.
    """
    table = _PlainTable(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_edge=False,
        show_header=has_header,
    )
    for column in columns:
        table.add_column(column)
    return table


def cards_table(source: Source, *columns: str) -> Table:
    """Return a table with a row for each card: its name, the precision, and figures.

    Args:
        source: Where the figures come from.
        *columns: Names of the columns of figures, which are aligned to the right.
    """
    table = plain_table()
    table.add_column(f"GPU ({source.value})", min_width=_NAME_WIDTH)
    table.add_column("precision", no_wrap=True)
    for column in columns:
        # A plan may have two lines. A figure that is cut says something else.
        table.add_column(column, justify="right", no_wrap=column != "plan")
    return table
