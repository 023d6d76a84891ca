"""`memfit probe`: the largest batch size that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from memfit.cli.options import device_options, search_options, step_options
from memfit.cli.output import check_writable, html_option, print_json, write
from memfit.errors import DoesNotFitError

__all__ = ["probe"]


@click.command(short_help="Find the largest batch size that fits a device.")
@click.argument("model")
@device_options
@step_options
@click.option("--accumulate", is_flag=True, help="Probe the micro-batch of accumulated steps.")
@search_options
@html_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def probe(
    *,
    model: str,
    device: str | None,
    gpus: tuple[str, ...],
    engine: str,
    memory: str | None,
    step: dict[str, Any],
    accumulate: bool,
    search: dict[str, Any],
    html: Path | None,
    as_json: bool,
) -> None:
    """Find the largest batch size of a training step of MODEL that fits, and prove it.

    MODEL is the name of a timm model, such as resnet50 or vit_base_patch16_224. Real steps run on
    the device; the answer fitted, and one sample more ran out of memory. With --gpu the card need
    not be there: torch's own CUDA software runs and its kernels do nothing (rehearsed), or the
    step's allocations are replayed on a model of the card (simulated). The answer says which.
    """
    from memfit import api

    check_writable(html)
    if device is None and (len(gpus) > 1 or not (gpus or api.has_gpu())):
        found = api.survey(
            model,
            gpus=gpus or None,
            memory=memory,
            engine=engine,
            accumulate=accumulate,
            **search,
            **step,
        )
        if html is not None:
            from memfit.reports.probe_page import survey_page

            write(html, survey_page(found))
        if as_json:
            print_json(found.answers)
        else:
            from memfit.reports import survey

            Console().print(survey.render(found))
        if not any(answer.result for answer in found.answers):
            raise DoesNotFitError(f"{model} fits none of these cards, even at batch size 1.")
        return
    from memfit.reports.probe import ProgressTable, render

    log = Console(stderr=True)
    table = ProgressTable()
    with Live(table, console=log, transient=True, refresh_per_second=4) as live:
        if as_json or not log.is_terminal:
            live.stop()
        result = api.probe(
            model,
            device=device,
            gpu=gpus[0] if gpus else None,
            memory=memory,
            engine=engine,
            accumulate=accumulate,
            progress=table.add,
            **search,
            **step,
        )
    if html is not None:
        from memfit.reports.probe_page import page

        write(html, page(result))
    if as_json:
        print_json([result])
    else:
        Console().print(render(result))
