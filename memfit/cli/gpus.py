"""`memfit gpus`: the cards that can be simulated."""

from __future__ import annotations

import click

from memfit.cli.commands import Command, Switch
from memfit.cli.completion import complete_gpus
from memfit.cli.output import print_json

__all__ = ["gpus"]


@click.command(cls=Command, short_help="List the GPUs that can be simulated.")
@click.argument("name", required=False, shell_complete=complete_gpus)
@click.option("--json", "as_json", cls=Switch, help="Print the list as JSON.")
def gpus(*, name: str | None, as_json: bool) -> None:
    """List the GPUs that `memfit probe --gpu` knows, with their memory and its source.

    With NAME, show only that GPU.
    """
    from memfit.cards import catalogue, find_gpu
    from memfit.reports.gpus import render

    cards = catalogue() if name is None else (find_gpu(name),)
    if as_json:
        print_json(cards)
    else:
        from rich.console import Console

        Console().print(render(cards))
