"""`memfit plan`: micro-batches and accumulation steps for a target batch size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memfit.cli.asking import ask_each, cards_for, check_single, refuse_unfit, under_way
from memfit.cli.options import Given, as_typed, optional_models_argument, shared_options
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
from memfit.cli.scripts import is_script, plan_script
from memfit.cli.subjects import name_of, subject_of
from memfit.cli.train_args import changes_for, given_by, require_models
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Objective, Plan, PlanSurvey

if TYPE_CHECKING:
    from memfit.cli.subjects import Subject
    from memfit.integrations.train_args import TrainArguments
    from memfit.records import Exploration

__all__ = ["plan"]

_A_CARD = "rtx4090"
_TRAINERS = ("pytorch", "timm", "lightning", "accelerate", "transformers", "fastai")


@click.command(short_help="Turn a target batch size into micro-batches that fit.")
@optional_models_argument
@click.option(
    "--effective-batch",
    "effective_batch_size",
    type=as_typed,
    metavar="SAMPLES",
    help=(
        "Samples in each optimizer step, over all ranks together. Required without --train-args."
    ),
)
@click.option(
    "--world-size",
    type=int,
    default=1,
    show_default=True,
    help="Number of ranks that share these samples.",
)
@click.option(
    "--objective",
    type=click.Choice([choice.value for choice in Objective]),
    default=Objective.LARGEST.value,
    show_default=True,
    help=(
        "largest: the fewest micro-batches. fastest: the most samples per "
        "second, as measured. even: micro-batches of equal size only."
    ),
)
@click.option(
    "--explore",
    is_flag=True,
    help=("Simulate changes of the step, one at a time, and show how much more would fit."),
)
@click.option(
    "--emit",
    "trainer",
    type=click.Choice(_TRAINERS),
    help=("Print the lines to paste or run for this trainer. The report goes to standard error."),
)
@click.option(
    "--train-args",
    metavar="ARGUMENTS",
    help=(
        "The arguments of timm's train.py, in quotes, in place of a model and of the step's "
        "options. The flags to change are printed below the plan."
    ),
)
@shared_options()
@html_option
@plot_option
@format_options
@click.pass_context
def plan(
    context: click.Context,
    *,
    models: tuple[str, ...],
    effective_batch_size: Any,
    world_size: int,
    objective: str,
    explore: bool,
    trainer: str | None,
    train_args: str | None,
    given: Given,
    html: Path | None,
    plot: Path | None,
    output: Format,
) -> None:
    """Turn an effective batch size into micro-batches of MODEL that fit.

    MODEL is the name of a timm model, or package.module:function, a function of yours that returns
    a memfit.Workload. Several models are planned one after another. The
    micro-batches add up exactly to the effective batch. Real steps run on the device; with --gpu,
    the card is rehearsed or simulated. The plan's own micro-batch was tried, and it fitted with the
    headroom. On a machine without a GPU, and without --gpu, common cards are simulated.

    Write your own command after two dashes, with {} for the micro-batch and {steps}:

        memfit plan --effective-batch 1024 -- python train.py --batch-size {} --steps {steps}
    """
    read = None
    if train_args is not None:
        read, given = given_by(train_args, context, given, models=models)
        models = (read.model,)
        effective_batch_size = read.samples_per_step(effective_batch_size, world_size)
    require_models(models, effective_batch_size)
    if is_script(models):
        plan_script(
            models,
            effective_batch_size,
            given,
            world_size=world_size,
            as_json=output is Format.JSON,
        )
        return
    _check_together(given, trainer=trainer, output=output, explore=explore)
    check_writable(html, plot)
    check_picture(plot)
    check_single(models, html=html, plot=plot, explore=explore, emit=trainer)
    cards = cards_for(given, models)
    is_survey = given.device is None and len(cards) > 1
    if is_survey and (explore or trainer):
        option = "--explore" if explore else "--emit"
        raise UsageError(f"{option} is for one device. Give one --gpu, such as --gpu {_A_CARD}.")
    from memfit import api

    target: dict[str, Any] = {
        "world_size": world_size,
        "objective": objective,
        **given.keywords,
    }
    shown = _Shown(trainer=trainer, output=output)

    subjects = list(map(subject_of, models))

    def ask(model: Subject) -> Plan | PlanSurvey:
        with under_way(f"planning for {name_of(model)}") as bar:
            if is_survey:
                return api.survey_plans(
                    model, effective_batch_size, gpus=cards, progress=bar.stage, **target
                )
            card = cards[0] if cards else None
            return api.plan(
                model,
                effective_batch_size,
                device=given.device,
                gpu=card,
                progress=bar.trial,
                **target,
            )

    def explored() -> Exploration:
        with under_way(f"exploring {name_of(subjects[0])}") as bar:
            card = cards[0] if cards else None
            return api.explore(
                subjects[0],
                effective_batch_size,
                device=given.device,
                gpu=card,
                progress=bar.stage,
                **target,
            )

    shown.arguments = read
    found = _planned(subjects, ask, explored if explore else None, shown=shown, html=html)
    if html is not None:
        write(html, _page(found[0]))
    if plot is not None:
        from memfit.reports.pictures import draw_plan

        draw_plan(found[0], plot)
    for result in found:
        refuse_unfit(result)


def _check_together(given: Given, *, trainer: str | None, output: Format, explore: bool) -> None:
    """Refuse options that exclude each other."""
    device = given.device
    if trainer and output is not Format.TEXT:
        raise UsageError(
            f"Give --emit or --{output.value}, not both. With either, nothing else is printed."
        )
    if explore and "auto" in given.step["checkpoint"]:
        raise UsageError(
            "--explore tries one change at a time, and --checkpoint auto is one: leave one of the "
            "two out."
        )
    if explore and device is not None and device.partition(":")[0] == "cpu":
        raise UsageError(
            "--explore tries changes by simulation, and only GPUs can be "
            "simulated. Give it with --gpu, or with --device cuda."
        )


def _planned(
    models: Sequence[Subject],
    ask: Callable[[Subject], Plan | PlanSurvey],
    explore: Callable[[], Exploration] | None,
    *,
    shown: _Shown,
    html: Path | None,
) -> list[Plan | PlanSurvey]:
    """Plan for every model; show each plan before alternatives are searched."""
    found: list[Plan | PlanSurvey] = []
    try:
        for result in ask_each(models, ask):
            found.append(result)
            shown.plan(result)
        if explore is not None:
            exploration = explore()
            shown.exploration(exploration)
            found = [
                dataclasses.replace(each, exploration=exploration)
                for each in found
                if isinstance(each, Plan)
            ]
    except DoesNotFitError:
        if explore is not None:
            exploration = explore()
            shown.exploration(exploration, alone=True)
            if html is not None:
                write(html, _page(exploration))
        raise
    finally:
        # Results from before an error or Ctrl-C are printed too.
        shown.end(found)
    return found


class _Shown:
    """Writes results to standard output, in the chosen format.

    Args:
        trainer: The trainer whose lines are printed; then nothing else is printed there.
        output: The format of everything else.
    """

    def __init__(self, *, trainer: str | None, output: Format) -> None:
        from rich.console import Console

        self._trainer = trainer
        self._output = output
        # Lines for a trainer are pasted or piped, so nothing else goes to standard output.
        self._console = Console(stderr=trainer is not None)
        self._is_first = True
        self.arguments: TrainArguments | None = None

    def plan(self, result: Plan | PlanSurvey) -> None:
        """Show a plan, or the plans for several cards."""
        from memfit.reports.plan import render, render_survey

        if self._output is Format.TEXT:
            if not self._is_first:
                self._console.print()
            self._is_first = False
            self._console.print(
                render(result) if isinstance(result, Plan) else render_survey(result)
            )
            if self.arguments is not None and isinstance(result, Plan):
                for line in changes_for(result, self.arguments):
                    self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def exploration(self, exploration: Exploration, *, alone: bool = False) -> None:
        """Show what else would fit; `alone` if there is no plan to show with it."""
        from memfit.reports.plan import render_exploration

        if self._output is Format.TEXT:
            if not alone:
                self._console.print()
            self._console.print(render_exploration(exploration))
        elif self._output is Format.JSON and alone:
            print_json([exploration])

    def end(self, found: Sequence[Plan | PlanSurvey]) -> None:
        """Print the output that needs all results."""
        if not found:
            return
        if self._output is Format.JSON:
            nested = ([each] if isinstance(each, Plan) else each.answers for each in found)
            print_json(itertools.chain.from_iterable(nested))
        elif self._output is Format.CSV:
            from memfit.reports.rows import plan_rows

            print_csv(plan_rows(found))
        elif self._trainer is not None and isinstance(found[0], Plan):
            from memfit.integrations import lines_for

            emitted = lines_for(_built(found[0], self._trainer), self._trainer)
            click.echo(err=True)
            click.echo(emitted, nl=False)


def _built(plan: Plan, trainer: str) -> Plan:
    """Return the plan with all that a model's image size changes, for a model of timm.

    Raises:
        UsageError: The lines are for timm's own trainer, and the model is not timm's.
    """
    from memfit.step.timm_models import as_built, import_timm

    if not import_timm().is_model(plan.subject.partition(".")[0]):
        if trainer == "timm":
            raise UsageError(
                f"timm's train.py trains timm's models by their names, and {plan.subject} is not "
                "one of them: emit pytorch."
            )
        return plan
    return dataclasses.replace(plan, options=as_built(plan.subject, plan.options))


def _page(found: Plan | PlanSurvey | Exploration) -> str:
    from memfit.reports import exploration_page, plan_page

    if isinstance(found, Plan):
        return plan_page.page(found)
    if isinstance(found, PlanSurvey):
        return plan_page.survey_page(found)
    return exploration_page.page(found)
