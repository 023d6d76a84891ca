"""What commands print besides their reports."""

from __future__ import annotations

import json
from collections.abc import Iterable

import click

from memfit.records import SCHEMA_VERSION, Record

__all__ = ["print_json"]


def print_json(results: Iterable[Record]) -> None:
    """Print one JSON object with a list of results, as every command does with `--json`.

    Args:
        results: One for each thing that was asked about.
    """
    plain = [result.to_dict() for result in results]
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "results": plain}, indent=2))
