"""What commands print and write besides their reports."""

from __future__ import annotations

import csv
import enum
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from memfit.errors import UsageError
from memfit.records import SCHEMA_VERSION, Record

__all__ = [
    "OUTPUT",
    "Format",
    "check_picture",
    "check_writable",
    "format_options",
    "html_option",
    "plot_option",
    "print_csv",
    "print_json",
    "write",
]

OUTPUT = click.Path(dir_okay=False, path_type=Path)
"""A file that a command writes, as the type of an option."""

html_option = click.option(
    "--html", type=OUTPUT, metavar="FILE", help="Write a page to look at in a browser, offline."
)

plot_option = click.option(
    "--plot", type=OUTPUT, metavar="FILE", help="Write the main picture; .svg, .png or .pdf."
)


class Format(enum.Enum):
    """How a command prints what it found."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--json` and `--csv`, as one `Format` named `output`.

    Raises:
        UsageError: When the command runs: both were given.
    """

    @functools.wraps(command)
    def formatted(*, as_json: bool, as_csv: bool, **given: Any) -> Any:
        if as_json and as_csv:
            raise UsageError("Give --json or --csv, not both: each is all that is printed.")
        output = Format.JSON if as_json else Format.CSV if as_csv else Format.TEXT
        return command(output=output, **given)

    json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    csv_option = click.option(
        "--csv", "as_csv", is_flag=True, help="Print a table of comma-separated values."
    )
    return json_option(csv_option(formatted))


def print_csv(rows: Sequence[Sequence[object]]) -> None:
    """Print a table of comma-separated values.

    Args:
        rows: The names of the columns first.
    """
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


def print_json(results: Iterable[Record]) -> None:
    """Print one JSON object with a list of results, as every command does with `--json`.

    Args:
        results: One for each thing that was asked about.
    """
    plain = [result.to_dict() for result in results]
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "results": plain}, indent=2))


def check_picture(path: Path | None) -> None:
    """Refuse, before any work is done, a picture in a format that there is not.

    Args:
        path: Where to; `None` where none is asked for.

    Raises:
        UsageError: Its ending is no format of pictures.
    """
    if path is not None:
        from memfit.reports.picture import check_format

        check_format(path)


def check_writable(*paths: Path | None) -> None:
    """Refuse, before any work is done, files that could not be written after it.

    Args:
        *paths: Where to; `None` for what is not asked for.

    Raises:
        UsageError: There is no such folder, or writing there is not allowed.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.parent
        if not folder.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {folder}.")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UsageError(f"{path} cannot be written: permission denied.")


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
