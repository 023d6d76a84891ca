"""`memfit choose`: the most accurate models that can be fine-tuned on a card."""

from __future__ import annotations

from typing import Any

import click

from memfit.cli.asking import check_cards
from memfit.cli.commands import Command
from memfit.cli.completion import complete_models
from memfit.cli.options import Given, WholeRange, shared_options
from memfit.cli.output import Format, format_options, print_csv, print_json
from memfit.cli.sweeping import interrupted, on_each_row, pool_options, wide_console
from memfit.errors import UsageError
from memfit.units import parse_count

__all__ = ["choose"]


@click.command(cls=Command, short_help="Choose the best model that can be fine-tuned on a GPU.")
@click.argument("models", metavar="[PATTERN]...", nargs=-1, shell_complete=complete_models)
@click.option(
    "--effective-batch",
    "effective_batch_size",
    type=int,
    required=True,
    metavar="SAMPLES",
    help="Samples in each optimizer step.",
)
@click.option(
    "--top",
    type=WholeRange(min=1),
    help="Stop when this many models fit.  [default: 10; with PATTERN, all]",
)
@click.option(
    "--max-steps",
    type=WholeRange(min=1),
    default=16,
    show_default=True,
    help="The most accumulation steps that you would wait for.",
)
@shared_options(has_device=False)
@pool_options
@format_options
def choose(
    *,
    models: tuple[str, ...],
    effective_batch_size: int,
    top: int | None,
    max_steps: int,
    given: Given,
    pool: dict[str, Any],
    output: Format,
) -> None:
    """Choose the most accurate timm models that can be fine-tuned on --gpu, each with its plan.

    Models are tried from the best published accuracy on ImageNet down, on images of the size at
    which it was measured. PATTERN limits the choice to names, wildcards or the lines of a text
    file; an image size can follow an @. The table says how many micro-batches each model needs,
    whether accumulation gives the full batch's gradients, and what checkpointing would make fit.
    """
    if len(given.gpus) != 1:
        raise UsageError("A choice is for one card: give one --gpu, as in --gpu rtx3060.")
    check_cards(given)
    parse_count("The effective batch size", effective_batch_size)
    from memfit import sweeping
    from memfit.reports.sweep import choice_rows, render_choice

    with on_each_row("choosing") as shown:
        found = sweeping.choose(
            models,
            gpu=given.gpus[0],
            effective_batch_size=effective_batch_size,
            top=top,
            max_steps=max_steps,
            progress=shown.stage,
            **pool,
            **given.keywords,
        )
    if output is Format.JSON:
        print_json([found])
    elif output is Format.CSV:
        print_csv(choice_rows(found))
    else:
        wide_console().print(render_choice(found))
    if not found.is_complete:
        interrupted()
