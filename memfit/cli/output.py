"""Output of commands other than reports: CSV, JSON and files."""

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

from memfit.cli.commands import Switch
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
    "--html", type=OUTPUT, metavar="FILE", help="Write a page for the browser. It needs no network."
)

plot_option = click.option(
    "--plot",
    type=OUTPUT,
    metavar="FILE",
    help="Write the main picture. The file ends in .svg, .png or .pdf.",
)


class Format(enum.Enum):
    """The format in which a command prints its result."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--json` and `--csv`, as one `Format` named `output`.

    Raises:
        UsageError: Both were given. It is raised when the command runs.
    """

    @functools.wraps(command)
    def formatted(*, as_json: bool, as_csv: bool, **given: Any) -> Any:
        if as_json and as_csv:
            raise UsageError(
                "Give --json or --csv, not both. With either, nothing else is printed."
            )
        output = Format.JSON if as_json else Format.CSV if as_csv else Format.TEXT
        return command(output=output, **given)

    json_option = click.option("--json", "as_json", cls=Switch, help="Print the result as JSON.")
    csv_option = click.option(
        "--csv", "as_csv", cls=Switch, help="Print a table of comma-separated values."
    )
    return json_option(csv_option(formatted))


def print_csv(rows: Sequence[Sequence[object]]) -> None:
    """Print a table of comma-separated values.

    Args:
        rows: The rows; the first has the names of the columns.
    """
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


def print_json(results: Iterable[Record]) -> None:
    """Print one JSON object with a list of results, for `--json`.

    Args:
        results: One for each model, card or command.
    """
    plain = [result.to_dict() for result in results]
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "results": plain}, indent=2))


def check_picture(path: Path | None) -> None:
    """Before any work is done, refuse a picture in an unknown format.

    Args:
        path: The picture's file; `None` if no picture is wanted.

    Raises:
        UsageError: The file's ending is not a known picture format.
    """
    if path is not None:
        from memfit.reports.picture import check_format

        check_format(path)


def check_writable(*paths: Path | None) -> None:
    """Before any work is done, refuse files that cannot be written.

    Args:
        *paths: The files; `None` for a file that is not wanted.

    Raises:
        UsageError: The folder does not exist, or writing to it is not allowed.
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
        UsageError: The file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
