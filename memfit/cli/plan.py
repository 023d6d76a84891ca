"""`memfit plan`: micro-batches and accumulation steps for a target batch size."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live

from memfit.cli.options import device_options, search_options, step_options
from memfit.cli.output import check_writable, html_option, print_json, write
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Objective

if TYPE_CHECKING:
    from memfit.records import Exploration, Plan

__all__ = ["plan"]

_TRAINERS = ("pytorch", "timm", "lightning", "accelerate", "transformers", "fastai")


def _as_typed(text: str) -> int | float | str:
    """Return the number, or the text itself: whatever is no number gets memfit's own sentence."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


@click.command(short_help="Turn a target batch size into micro-batches that fit.")
@click.argument("model")
@click.option(
    "--effective-batch",
    "effective_batch_size",
    type=_as_typed,
    required=True,
    metavar="SAMPLES",
    help="Samples in each optimizer step, over all ranks.",
)
@click.option("--world-size", type=int, default=1, show_default=True, help="Ranks that share them.")
@click.option(
    "--objective",
    type=click.Choice([choice.value for choice in Objective]),
    default=Objective.LARGEST.value,
    show_default=True,
    help="The fewest steps, the most samples per second as measured, or equal parts only.",
)
@click.option(
    "--explore", is_flag=True, help="Simulate what one change of the step would make fit."
)
@click.option(
    "--emit",
    "trainer",
    type=click.Choice(_TRAINERS),
    help="Print what to paste or run for this trainer; the rest goes to standard error.",
)
@device_options
@step_options
@search_options
@html_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    *,
    model: str,
    effective_batch_size: Any,
    world_size: int,
    objective: str,
    explore: bool,
    trainer: str | None,
    device: str | None,
    gpus: tuple[str, ...],
    engine: str,
    memory: str | None,
    step: dict[str, Any],
    search: dict[str, Any],
    html: Path | None,
    as_json: bool,
) -> None:
    """Turn an effective batch size into micro-batches of MODEL that fit.

    MODEL is the name of a timm model. The parts add up to the effective batch exactly. Real steps
    run on the device, or with --gpu are simulated; the plan's own micro-batch is among those that
    were tried, and fitted with the headroom.
    """
    if trainer and as_json:
        raise UsageError("Give --emit or --json, not both: each is all that is printed.")
    if html is not None and not explore:
        raise UsageError("--html shows what --explore finds: give both.")
    if explore and device is not None and device.partition(":")[0] == "cpu":
        raise UsageError(
            "What else would fit is simulated, and only GPUs can be: give --explore with --gpu, or "
            "with --device cuda."
        )
    check_writable(html)
    from memfit import api

    target: dict[str, Any] = {
        "world_size": world_size,
        "objective": objective,
        "memory": memory,
        "engine": engine,
        **search,
        **step,
    }
    if device is None and (len(gpus) > 1 or not (gpus or api.has_gpu())):
        if explore or trainer:
            option = "--explore" if explore else "--emit"
            raise UsageError(f"{option} is for one device: give one --gpu, or --device.")
        _survey(model, effective_batch_size, gpus, target, as_json=as_json)
        return
    target |= {"device": device, "gpu": gpus[0] if gpus else None}
    try:
        result = _planned(model, effective_batch_size, target, is_quiet=as_json)
    except DoesNotFitError:
        if explore:
            exploration = api.explore(model, effective_batch_size, **_simulated(target))
            _write_page(exploration, html)
            _show_exploration(exploration, as_json=as_json)
        raise
    if explore:
        exploration = api.explore(model, effective_batch_size, **_simulated(target))
        _write_page(exploration, html)
        result = dataclasses.replace(result, exploration=exploration)
    _show(result, trainer=trainer, as_json=as_json)


def _survey(
    model: str,
    effective_batch_size: Any,
    gpus: tuple[str, ...],
    target: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from memfit import api

    found = api.survey_plans(model, effective_batch_size, gpus=gpus or None, **target)
    if as_json:
        print_json(found.answers)
    else:
        from memfit.reports.plan import render_survey

        Console().print(render_survey(found))
    if not any(answer.plan for answer in found.answers):
        raise DoesNotFitError(f"{model} fits none of these cards, even at batch size 1.")


def _simulated(target: dict[str, Any]) -> dict[str, Any]:
    """Return what an exploration takes: it is simulated whatever the engine."""
    return {name: value for name, value in target.items() if name != "engine"}


def _planned(
    model: str, effective_batch_size: Any, target: dict[str, Any], *, is_quiet: bool
) -> Plan:
    from memfit import api
    from memfit.reports.probe import ProgressTable

    log = Console(stderr=True)
    table = ProgressTable()
    with Live(table, console=log, transient=True, refresh_per_second=4) as live:
        if is_quiet or not log.is_terminal:
            live.stop()
        return api.plan(model, effective_batch_size, progress=table.add, **target)


def _show(result: Plan, *, trainer: str | None, as_json: bool) -> None:
    from memfit.integrations import lines_for
    from memfit.reports.plan import render

    if as_json:
        print_json([result])
        return
    emitted = lines_for(result, trainer) if trainer else None
    # What is to be pasted or piped is all that goes to standard output.
    Console(stderr=emitted is not None).print(render(result))
    if emitted is not None:
        click.echo(err=True)
        click.echo(emitted, nl=False)


def _show_exploration(exploration: Exploration, *, as_json: bool) -> None:
    from memfit.reports.plan import render_exploration

    if as_json:
        print_json([exploration])
    else:
        Console().print(render_exploration(exploration))


def _write_page(exploration: Exploration, html: Path | None) -> None:
    from memfit.reports.exploration_page import page

    if html is not None:
        write(html, page(exploration))
