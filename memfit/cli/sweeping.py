"""What `memfit sweep` and `memfit choose` share: processes, journals, and lines as results come."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memfit.cli.commands import Switch
from memfit.cli.options import WholeRange
from memfit.cli.output import OUTPUT, check_writable
from memfit.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Shown", "interrupted", "on_each_row", "pool_options", "wide_console", "write_parquet"]

_WIDTH = 160
_INTERRUPTED = 130


def wide_console() -> Console:
    """Return a console for a table of many columns: a file or a pipe has no width of its own."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def pool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --workers, --ray and --journal; it gets them as `pool`, keyword arguments."""

    @functools.wraps(command)
    def pooled(
        *, workers: int | None, ray: str | None, journal: Path | None, fresh: bool, **others: Any
    ) -> Any:
        check_writable(journal)
        if fresh and journal is not None:
            raise UsageError("Give --fresh or --journal, not both: delete the file instead.")
        kept = None if fresh else journal or "auto"
        return command(pool={"workers": workers, "ray": ray, "journal": kept}, **others)

    options = (
        click.option(
            "--workers",
            type=WholeRange(min=1),
            help="Processes at a time; by default what cores and memory allow.",
        ),
        click.option(
            "--ray",
            metavar="auto|ADDRESS",
            help="Run on a Ray cluster (pip install memfit[sweep]).",
        ),
        click.option(
            "--journal",
            type=OUTPUT,
            metavar="FILE",
            help="Keep results in this file; by default in the user's cache, until "
            "the sweep is complete.",
        ),
        click.option("--fresh", cls=Switch, help="Start from the beginning, and keep no journal."),
    )
    return functools.reduce(lambda inner, option: option(inner), reversed(options), pooled)


class Shown:
    """A bar in the terminal, with a line above it for each result; silent elsewhere.

    Args:
        bar: The bar; `None` if standard error is no terminal.
    """

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=None)

    def stage(self, what: str, done: int, total: int) -> None:
        """Show how far the work is."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)

    def say(self, line: str) -> None:
        """Show a result."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=False)


@contextlib.contextmanager
def on_each_row(what: str) -> Iterator[Shown]:
    """Show results as they come, on standard error, if it is a terminal.

    Args:
        what: What runs, in a word.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Shown(None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Shown(bar)


def write_parquet(rows: Sequence[Sequence[object]] | None, path: Path) -> None:
    """Write a table as Parquet.

    Args:
        rows: The names of the columns, and the rows; `None` to check only that it can be written.
        path: The file.

    Raises:
        UnsupportedError: pyarrow is not installed.
        UsageError: The file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UnsupportedError(
            "--parquet needs pyarrow, which is not installed: pip install 'memfit[sweep]'."
        ) from error
    if rows is None:
        return
    names = [str(name) for name in rows[0]]
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(names)
    table = pa.table(
        {name: pa.array(list(column)) for name, column in zip(names, columns, strict=True)}
    )
    try:
        pq.write_table(table, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error


def interrupted() -> None:
    """End with the exit code of an interruption."""
    click.echo("memfit: interrupted; the same command goes on where it stopped.", err=True)
    sys.exit(_INTERRUPTED)
