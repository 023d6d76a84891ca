"""What commands print and write besides their reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import click

from memfit.errors import UsageError
from memfit.records import SCHEMA_VERSION, Record

__all__ = ["OUTPUT", "check_writable", "html_option", "print_json", "write"]

OUTPUT = click.Path(dir_okay=False, path_type=Path)
"""A file that a command writes, as the type of an option."""

html_option = click.option(
    "--html", type=OUTPUT, metavar="FILE", help="Write a page to look at in a browser, offline."
)


def print_json(results: Iterable[Record]) -> None:
    """Print one JSON object with a list of results, as every command does with `--json`.

    Args:
        results: One for each thing that was asked about.
    """
    plain = [result.to_dict() for result in results]
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "results": plain}, indent=2))


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
