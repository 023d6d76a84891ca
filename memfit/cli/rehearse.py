"""`memfit rehearse`: runs any training command on a card that is not in the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memfit.cli.commands import Command, Switch
from memfit.cli.completion import complete_gpus
from memfit.cli.options import WholeRange
from memfit.cli.output import OUTPUT, check_writable, html_option, print_json, write
from memfit.errors import DoesNotFitError, ToldToEnd, UsageError
from memfit.records import Rehearsal, RehearsalEnd

if TYPE_CHECKING:
    from memfit.rehearsal.ranks import LoneRank

__all__ = ["rehearse"]

_SIGNAL_CODES = 128
_ENDS_OF_MEMFIT = {RehearsalEnd.INTERRUPTED: 130, RehearsalEnd.TERMINATED: ToldToEnd.exit_code}


@click.command(
    cls=Command,
    short_help="Run any training command on a GPU that is not there.",
    context_settings={"allow_interspersed_args": False},
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_gpus,
    help="The card (see `memfit gpus`), or `any` with --memory. May be repeated.",
)
@click.option("--memory", metavar="SIZE", help="Memory that each card has, such as 16GiB.")
@click.option(
    "--num-gpus",
    type=int,
    help=(
        "Number of such cards that the command sees.  [default: torchrun's "
        "--nproc-per-node, else 1]"
    ),
)
@click.option(
    "--world-size",
    type=int,
    metavar="RANKS",
    help="Rehearse one rank of a training run with so many, without torchrun.",
)
@click.option("--rank", type=int, help="Which rank --world-size rehearses.  [default: 0]")
@click.option(
    "--steps",
    "num_steps",
    type=WholeRange(min=1),
    default=3,
    show_default=True,
    help=("End the command when the peak has not risen for this many optimizer steps."),
)
@click.option("--whole", cls=Switch, help="Let the command run to its end.")
@click.option(
    "--no-values",
    cls=Switch,
    help="Do not compute what a few operations on small tensors give. All reads as zeros then.",
)
@html_option
@click.option(
    "--snapshot",
    type=OUTPUT,
    metavar="FILE",
    help="Write the allocator's history for PyTorch's viewer (pytorch.org/memory_viz).",
)
@click.option(
    "--json",
    "as_json",
    cls=Switch,
    help="Print the report as JSON. What the command prints goes to standard error.",
)
def rehearse(
    *,
    command: tuple[str, ...],
    gpus: tuple[str, ...],
    memory: str | None,
    num_gpus: int | None,
    world_size: int | None,
    rank: int | None,
    num_steps: int,
    whole: bool,
    no_values: bool,
    html: Path | None,
    snapshot: Path | None,
    as_json: bool,
) -> None:
    """Run COMMAND unchanged on a GPU that is not here, and show the memory that it needs.

    PyTorch's own CUDA software runs, but its kernels do nothing. Write COMMAND after two dashes:

        memfit rehearse --gpu "RTX 4090" -- python train.py --batch-size 128

    memfit ends the command when its peak no longer rises. The exit code is 3 if memory ran out. If
    the command failed for another reason, it is the command's own exit code.
    """
    from memfit.cards import find_gpu
    from memfit.rehearsal.children import Output, check_command
    from memfit.units import parse_bytes

    # What can be refused is refused before torch is imported, which takes seconds.
    check_writable(html, snapshot)
    if not gpus:
        raise UsageError(
            "Name the card with --gpu, such as --gpu rtx4090. `memfit gpus` lists them."
        )
    if len(gpus) > 1 and (html is not None or snapshot is not None):
        raise UsageError("--html and --snapshot show one card. Give one --gpu.")
    total_bytes = None if memory is None else parse_bytes(memory)
    cards = [find_gpu(name, total_bytes=total_bytes) for name in gpus]
    lone_rank = _lone_rank(command, rank, world_size, num_gpus)
    check_command(command)

    from memfit.rehearsal.activate import rehearsed_environment
    from memfit.rehearsal.ranks import num_launched
    from memfit.rehearsal.run import rehearse_command
    from memfit.reports.rehearsal import render, render_several

    count = num_gpus
    if count is None:
        count = num_launched(command) if lone_rank is None else lone_rank.gpus_of_node
    environments = [
        rehearsed_environment(card, num_gpus=count, environment=os.environ) for card in cards
    ]
    found = []
    for card, environment in zip(cards, environments, strict=True):
        run = rehearse_command(
            command,
            card,
            environment,
            num_steps=num_steps,
            is_whole=whole,
            keeps_history=html is not None or snapshot is not None,
            output=Output.STANDARD_ERROR if as_json else Output.OWN,
            lone_rank=lone_rank,
            computes=not no_values,
        )
        found.append(run)
        if run.rehearsal.end in _ENDS_OF_MEMFIT:
            break
    rehearsals = [each.rehearsal for each in found]
    if snapshot is not None:
        from memfit.profiling.rehearsed import write_snapshot

        write_snapshot(found[0], snapshot)
    if html is not None:
        from memfit.profiling.rehearsed import recorded_step
        from memfit.reports.rehearsal_page import page

        write(html, page(found[0].rehearsal, recorded_step(found[0])))
    if as_json:
        print_json(rehearsals)
    else:
        from rich.console import Console

        shown = render(rehearsals[0]) if len(rehearsals) == 1 else render_several(rehearsals)
        Console().print(shown, soft_wrap=False)
    sys.exit(_exit_code(rehearsals))


def _lone_rank(
    command: tuple[str, ...], rank: int | None, world_size: int | None, num_gpus: int | None
) -> LoneRank | None:
    from memfit.rehearsal.ranks import LoneRank, refuse_launcher

    if world_size is None:
        if rank is not None:
            raise UsageError("--rank says which rank of --world-size is rehearsed. Give both.")
        return None
    refuse_launcher(command)
    return LoneRank(rank=rank or 0, world_size=world_size, num_gpus=num_gpus)


def _exit_code(rehearsals: list[Rehearsal]) -> int:
    if not all(rehearsal.fits for rehearsal in rehearsals):
        return DoesNotFitError.exit_code
    if rehearsals[-1].end in _ENDS_OF_MEMFIT:
        return _ENDS_OF_MEMFIT[rehearsals[-1].end]
    codes = [rehearsal.exit_code for rehearsal in rehearsals if rehearsal.exit_code]
    return next((_SIGNAL_CODES - code if code < 0 else code for code in codes), 0)
