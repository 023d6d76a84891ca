"""`memfit probe`: the largest batch size that fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memfit.cli.asking import ask_each, cards_for, check_single, refuse_unfit, under_way
from memfit.cli.commands import Command, Switch
from memfit.cli.options import (
    Given,
    models_argument,
    parallel_option,
    shared_options,
    world_size_option,
)
from memfit.cli.output import (
    Format,
    check_picture,
    check_writable,
    format_options,
    html_option,
    plot_option,
    print_csv,
    print_json,
    write,
)
from memfit.cli.scripts import is_script, probe_script
from memfit.cli.subjects import name_of, subject_of
from memfit.records import ProbeResult, Survey, SurveyAnswer

if TYPE_CHECKING:
    from memfit.cli.subjects import Subject
    from memfit.records import Record

__all__ = ["probe"]


@click.command(cls=Command, short_help="Find the largest batch size that fits a device.")
@models_argument
@shared_options()
@click.option(
    "--accumulate",
    cls=Switch,
    help="Find the largest micro-batch of a step that accumulates gradients.",
)
@world_size_option
@parallel_option
@html_option
@plot_option
@format_options
def probe(
    *,
    models: tuple[str, ...],
    given: Given,
    accumulate: bool,
    world_size: int,
    parallel: str | None,
    html: Path | None,
    plot: Path | None,
    output: Format,
) -> None:
    """Find the largest batch size of a training step of MODEL that fits, and prove it.

    MODEL is the name of a timm model, such as resnet50 or vit_base_patch16_224, or
    package.module:function, a function of yours that returns a memfit.Workload. Several models are
    tried one after another. Real steps run on the device: the answer fitted, and one sample more
    ran out of memory. With --gpu, this machine does not need that card. Either torch's own CUDA
    software runs and its kernels do nothing (rehearsed), or the step's allocations are replayed on
    a model of the card (simulated). The answer says which. On a machine without a GPU, and without
    --gpu, common cards are simulated.

    Write your own command after two dashes, with {} in place of the batch size:

        memfit probe --gpu rtx4090 -- python train.py --batch-size {}
    """
    if is_script(models):
        probe_script(models, given, world_size=world_size, as_json=output is Format.JSON, html=html)
        return
    check_writable(html, plot)
    check_picture(plot)
    check_single(models, html=html, plot=plot)
    cards = cards_for(given, models)
    from memfit import api

    asked: dict[str, Any] = {
        "accumulate": accumulate,
        "world_size": world_size,
        "parallel": parallel,
        **given.keywords,
    }

    subjects = list(map(subject_of, models))

    def ask(model: Subject) -> ProbeResult | Survey:
        with under_way(f"probing {name_of(model)}") as bar:
            if given.device is None and len(cards) > 1:
                return api.survey(model, gpus=cards, progress=bar.stage, **asked)
            card = cards[0] if cards else None
            return api.probe(model, device=given.device, gpu=card, progress=bar.trial, **asked)

    found: list[ProbeResult | Survey] = []
    try:
        for result in ask_each(subjects, ask):
            found.append(result)
            if output is Format.TEXT:
                _show(result, is_next=len(found) > 1)
    finally:
        # Results from before an error or Ctrl-C are printed too.
        _print(found, output)
    if html is not None:
        write(html, _page(found[0]))
    if plot is not None:
        from memfit.reports.pictures import draw_probe

        draw_probe(found[0], plot)
    for result in found:
        refuse_unfit(result)


def _print(found: list[ProbeResult | Survey], output: Format) -> None:
    if not found:
        return
    if output is Format.JSON:
        print_json([record for result in found for record in _answers(result)])
    elif output is Format.CSV:
        from memfit.reports.rows import probe_rows

        print_csv(probe_rows(found))


def _answers(result: ProbeResult | Survey) -> tuple[Record, ...] | tuple[SurveyAnswer, ...]:
    return result.answers if isinstance(result, Survey) else (result,)


def _show(result: ProbeResult | Survey, *, is_next: bool) -> None:
    from rich.console import Console

    from memfit.reports import probe as one_card
    from memfit.reports import survey as several_cards

    console = Console()
    if is_next:
        console.print()
    if isinstance(result, Survey):
        console.print(several_cards.render(result))
    else:
        console.print(one_card.render(result))


def _page(result: ProbeResult | Survey) -> str:
    from memfit.reports.probe_page import page, survey_page

    return survey_page(result) if isinstance(result, Survey) else page(result)
