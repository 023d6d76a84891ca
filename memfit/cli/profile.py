"""`memfit profile`: what holds the memory of a training step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memfit.cli.asking import cards_for, under_way
from memfit.cli.commands import Command, Switch
from memfit.cli.completion import complete_models
from memfit.cli.options import (
    Given,
    NumberRange,
    parallel_option,
    shared_options,
    world_size_option,
)
from memfit.cli.output import (
    OUTPUT,
    check_picture,
    check_writable,
    html_option,
    plot_option,
    print_json,
    write,
)
from memfit.cli.subjects import name_of, subject_of
from memfit.errors import DoesNotFitError, PeakGrewError
from memfit.records import MemoryProfile
from memfit.units import format_bytes, parse_count

if TYPE_CHECKING:
    from memfit.profiling.baselines import Baselines

__all__ = ["profile"]


@click.command(cls=Command, short_help="Show what holds the memory of a training step.")
@click.argument("model", shell_complete=complete_models)
@click.option("--batch-size", type=int, required=True, help="Samples in a micro-batch.")
@shared_options(searches=False)
@click.option(
    "--accumulate",
    cls=Switch,
    help="Accumulate: run two micro-batches before the optimizer's step.",
)
@world_size_option
@parallel_option
@html_option
@plot_option
@click.option(
    "--snapshot",
    type=OUTPUT,
    metavar="FILE",
    help="Write the allocator's history for PyTorch's viewer (pytorch.org/memory_viz).",
)
@click.option(
    "--baseline",
    type=OUTPUT,
    metavar="FILE",
    help="Compare the peak with the one in FILE; exit code 5 if it has grown. If FILE has none, "
    "write the peak there.",
)
@click.option(
    "--tolerance",
    type=NumberRange(min=0),
    default=0.01,
    show_default=True,
    help="The share by which the peak may be above the baseline.",
)
@click.option("--json", "as_json", cls=Switch, help="Print the profile as JSON.")
def profile(
    *,
    model: str,
    batch_size: int,
    given: Given,
    accumulate: bool,
    world_size: int,
    parallel: str | None,
    html: Path | None,
    plot: Path | None,
    snapshot: Path | None,
    baseline: Path | None,
    tolerance: float,
    as_json: bool,
) -> None:
    """Show what holds the memory of a training step of MODEL, at its peak and over time.

    MODEL is the name of a timm model, or package.module:function, a function of yours that returns
    a memfit.Workload. With --gpu, the first card is rehearsed or simulated, and a
    chart shows memory by batch size for every card. With --device, or on a machine with a GPU, the
    step runs on the device and its allocations are recorded. The exit code is 0 if the batch fits,
    3 if it does not, and 5 if its peak is above the baseline.
    """
    check_writable(html, plot, snapshot, baseline)
    check_picture(plot)
    parse_count("The batch size", batch_size)
    cards = cards_for(given, (model,))
    from memfit import api
    from memfit.reports.profile import render

    kept = None if baseline is None else _opened(baseline)
    if len(cards) > 1 and not given.gpus:
        cards = (api.DEFAULT_GPU,)
        click.echo(
            "There is no GPU here and none was named, so memfit profiles the step on an "
            f"{api.DEFAULT_GPU}. To measure on the CPU, give --device cpu.",
            err=True,
        )
    subject = subject_of(model)
    with under_way(f"profiling {name_of(subject)}") as bar:
        found = api.profile(
            subject,
            batch_size,
            device=given.device,
            gpu=cards[0] if cards else None,
            compared=cards[1:],
            accumulate=accumulate,
            world_size=world_size,
            parallel=parallel,
            snapshot=snapshot,
            progress=bar.stage,
            **given.keywords,
        )
    if html is not None:
        from memfit.reports.profile_page import page

        write(html, page(found))
    if plot is not None:
        from memfit.reports.picture import draw

        draw(found, plot)
    if as_json:
        print_json([found])
    else:
        from rich.console import Console

        Console().print(render(found))
    if baseline is not None and kept is not None:
        _compare(found, kept, tolerance, path=baseline)
    if found.message is not None:
        sys.exit(DoesNotFitError.exit_code)


def _opened(path: Path) -> Baselines:
    from memfit.profiling.baselines import Baselines

    return Baselines(path)


def _compare(found: MemoryProfile, kept: Baselines, tolerance: float, *, path: Path) -> None:
    """Compare a profile with the peak that is kept, or keep it if there is none.

    Raises:
        PeakGrewError: The peak is higher.
    """
    from memfit.profiling.baselines import growth_words
    from memfit.reports.probe import step_words

    where = f"{found.subject} at batch size {found.batch_size} on {found.device}"
    name = ", ".join([where, *step_words(found.options)])
    source, version = found.source, found.torch_version
    if name not in kept:
        if found.message is not None:
            click.echo(f"The step does not fit, so its peak is not kept in {path}.", err=True)
            return
        kept.keep(name, found.peak, source=source, torch_version=version)
        click.echo(
            f"{path} had no peak of {name}. It is kept there now{kept.others_words(name)}.",
            err=True,
        )
        return
    growth = kept.compare(
        name, found.peak, tolerance=tolerance, source=source, torch_version=version
    )
    if growth.has_grown:
        raise PeakGrewError(growth_words(growth))
    click.echo(
        f"The peak is {format_bytes(growth.after_bytes)}, and {format_bytes(growth.before_bytes)} "
        f"is kept in {path}: it has not grown by more than {tolerance:.0%}.",
        err=True,
    )
