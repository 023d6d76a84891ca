"""`memfit sweep`: the batch sizes of many models on many cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memfit.cli.asking import check_cards
from memfit.cli.commands import Command, Switch
from memfit.cli.completion import complete_models
from memfit.cli.options import PRECISION, Given, WholeRange, shared_options
from memfit.cli.output import (
    OUTPUT,
    Format,
    check_writable,
    format_options,
    html_option,
    print_csv,
    print_json,
    write,
)
from memfit.cli.sweeping import interrupted, on_each_row, pool_options, wide_console, write_parquet
from memfit.errors import DoesNotFitError
from memfit.records import Precision, Sweep

__all__ = ["sweep"]

_ORDERS = (
    "asked",
    "model",
    "accuracy",
    "largest",
    "recommended",
    "peak",
    "sample",
    "parameters",
    "operations",
)


@click.command(cls=Command, short_help="Find the batch sizes of many models on many GPUs.")
@click.argument(
    "models", metavar="PATTERN...", nargs=-1, required=True, shell_complete=complete_models
)
@shared_options(swept=True)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=PRECISION,
    default=(Precision.AUTO.value,),
    help="Arithmetic; auto is each card's own. May be repeated.",
)
@click.option(
    "--optimizer",
    "optimizers",
    multiple=True,
    default=("adamw",),
    show_default=True,
    help="Any optimizer name timm knows. May be repeated.",
)
@click.option(
    "--image-size",
    "image_sizes",
    multiple=True,
    metavar="PIXELS",
    help="224, or 320x240 for height and width, for all models. May be repeated.",
)
@click.option(
    "--sort",
    "order",
    type=click.Choice(_ORDERS),
    default="asked",
    show_default=True,
    help="The order of the table in the terminal.",
)
@click.option(
    "--min-batch",
    type=WholeRange(min=1),
    default=1,
    help="Show models whose largest batch size is at least this.",
)
@click.option("--top", type=WholeRange(min=1), help="Show at most this many rows in the terminal.")
@click.option(
    "--quick",
    cls=Switch,
    help="Do not ask cuDNN for workspaces. For convolutional models this is several times quicker, "
    "and the recommended batch size can be a tenth too large.",
)
@pool_options
@html_option
@click.option("--parquet", type=OUTPUT, metavar="FILE", help="Write all rows as Parquet.")
@format_options
def sweep(
    *,
    models: tuple[str, ...],
    given: Given,
    precisions: tuple[str, ...],
    optimizers: tuple[str, ...],
    image_sizes: tuple[str, ...],
    order: str,
    min_batch: int,
    top: int | None,
    quick: bool,
    pool: dict[str, Any],
    html: Path | None,
    parquet: Path | None,
    output: Format,
) -> None:
    """Find the largest batch sizes of every model that matches a PATTERN, on every --gpu.

    PATTERN is the name of a timm model, a wildcard such as 'convnext_*', all, or a text file with
    one of these a line. An image size can follow an @, as in convnext_tiny@288. Each training step
    is traced once for all cards. Results are shown as they come. After Ctrl-C, the same command
    goes on where it stopped.
    """
    check_writable(html, parquet)
    check_cards(given)
    if parquet is not None:
        write_parquet(None, parquet)
    from memfit import sweeping
    from memfit.reports.sweep import ordered, render, row_words, sweep_rows

    with on_each_row("sweeping") as shown:
        found = sweeping.sweep(
            models,
            gpus=given.gpus or None,
            image_sizes=image_sizes or (None,),
            precisions=precisions,
            optimizers=optimizers,
            quick=quick,
            progress=shown.stage,
            on_rows=lambda rows: shown.say(row_words(rows)),
            **pool,
            **given.keywords,
        )
    if output is Format.JSON:
        print_json([found])
    elif output is Format.CSV:
        print_csv(sweep_rows(found.rows))
    else:
        wide_console().print(render(found, order=order, min_batch_size=min_batch, top=top))
    if parquet is not None:
        write_parquet(sweep_rows(found.rows), parquet)
    if html is not None:
        from memfit.reports.sweep_page import page

        write(html, page(found))
    _end(found, fits=bool(ordered(found.rows, "asked")))


def _end(found: Sweep, *, fits: bool) -> None:
    """End with the exit code of an interruption, or of a sweep in which nothing fits."""
    if not found.is_complete:
        interrupted()
    if not fits:
        raise DoesNotFitError("No model fits any of these cards, or none could be tried.")
