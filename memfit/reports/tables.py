"""Tables for the terminal, in which a name is shown as it is."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["plain_table"]


class _PlainTable(Table):
    """A table whose cells are text, where rich would read `[item]` as markup and leave it out."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; cells that are strings are shown letter by letter."""
        shown = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, **options)


def plain_table(*columns: str, has_header: bool = True) -> Table:
    """Return a table without lines, as every report has.

    Args:
        *columns: Names of columns that are aligned to the left.
        has_header: The names of the columns are shown.
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
