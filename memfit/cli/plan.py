"""`memfit plan`: micro-batches and accumulation steps for a target batch size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memfit.cli.asking import ask_each, cards_for, check_single, refuse_unfit, under_way
from memfit.cli.commands import Command, Switch, is_typed
from memfit.cli.emitting import emitted, refuse_unwritable
from memfit.cli.options import (
    Given,
    as_typed,
    optional_models_argument,
    parallel_option,
    shared_options,
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
from memfit.cli.scripts import is_script, plan_script
from memfit.cli.subjects import name_of, subject_of
from memfit.cli.train_args import changes_for, given_by, require_models
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Objective, Plan, PlanSurvey
from memfit.units import parse_count

if TYPE_CHECKING:
    from memfit.cli.subjects import Subject
    from memfit.integrations.train_args import TrainArguments
    from memfit.records import Exploration

__all__ = ["plan"]

_A_CARD = "rtx4090"
_FEWEST_RANKS = 2
_TRAINERS = ("pytorch", "timm", "lightning", "accelerate", "transformers", "fastai")


@click.command(cls=Command, short_help="Turn a target batch size into micro-batches that fit.")
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
@parallel_option
@click.option(
    "--together",
    cls=Switch,
    help=(
        "The cards of --gpu train together, one rank on each, in this order. Each takes the share "
        "that it has room for."
    ),
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
    cls=Switch,
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
    parallel: str | None,
    together: bool,
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
        if not is_typed(context, "effective_batch_size"):
            effective_batch_size = None  # train.py's own batch counts, not a project's default
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
    _check_together(given, trainer=trainer, output=output, explore=explore, parallel=parallel)
    _check_cards_together(
        given,
        together=together,
        others={
            "--device": given.device is not None,
            "--world-size": world_size != 1,
            "--objective": objective != Objective.LARGEST.value,
            "--explore": explore,
            "--train-args": train_args is not None,
            "--html": html is not None,
            "--plot": plot is not None,
        },
    )
    check_writable(html, plot)
    check_picture(plot)
    check_single(models, html=html, plot=plot, explore=explore, emit=trainer)
    parse_count("The effective batch size", effective_batch_size)
    cards = cards_for(given, models)
    is_survey = given.device is None and len(cards) > 1 and not together
    if is_survey and (explore or trainer):
        option = "--explore" if explore else "--emit"
        raise UsageError(f"{option} is for one device. Give one --gpu, such as --gpu {_A_CARD}.")
    target: dict[str, Any] = {"world_size": world_size, "objective": objective}
    shown = _Shown(trainer=trainer, output=output)

    subjects = list(map(subject_of, models))
    refuse_unwritable(
        subjects[0],
        effective_batch_size,
        trainer=trainer,
        device=given.device,
        cards_together=cards if together else (),
        world_size=world_size,
        options=given.step,
    )

    def ask(model: Subject) -> Plan | PlanSurvey:
        return _ask(
            model,
            effective_batch_size,
            cards=cards,
            given=given,
            together=together,
            target={**target, "parallel": parallel},
        )

    def explored() -> Exploration:
        from memfit import api

        with under_way(f"exploring {name_of(subjects[0])}") as bar:
            card = cards[0] if cards else None
            return api.explore(
                subjects[0],
                effective_batch_size,
                device=given.device,
                gpu=card,
                progress=bar.stage,
                **target,
                **given.keywords,
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


def _check_together(
    given: Given, *, trainer: str | None, output: Format, explore: bool, parallel: str | None
) -> None:
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
    if explore and parallel is not None:
        raise UsageError(
            "--explore tries changes by simulation, which has no ranks: leave --parallel out."
        )
    if explore and device is not None and device.partition(":")[0] == "cpu":
        raise UsageError(
            "--explore tries changes by simulation, and only GPUs can be "
            "simulated. Give it with --gpu, or with --device cuda."
        )


def _check_cards_together(given: Given, *, together: bool, others: Mapping[str, bool]) -> None:
    """Refuse options that do not go with a rank on each card.

    Args:
        given: The options that the user gave.
        together: Whether there is a rank on each card.
        others: Which of the other options were given.
    """
    if not together:
        return
    if len(given.gpus) < _FEWEST_RANKS:
        raise UsageError(
            f"--together has one rank on each card: give several, such as --gpu {_A_CARD} --gpu "
            "rtx3060."
        )
    option = next((name for name, is_given in others.items() if is_given), None)
    if option is not None:
        raise UsageError(f"{option} cannot be given with --together: leave one of the two out.")


def _ask(
    model: Subject,
    effective_batch_size: Any,
    *,
    cards: Sequence[str],
    given: Given,
    together: bool,
    target: Mapping[str, Any],
) -> Plan | PlanSurvey:
    """Plan for one model: on a device or card, on several, or for ranks on several."""
    from memfit import api

    with under_way(f"planning for {name_of(model)}") as bar:
        if together:
            return api.plan_together(
                model,
                effective_batch_size,
                gpus=cards,
                parallel=target["parallel"],
                progress=bar.trial,
                **given.keywords,
            )
        options = {**target, **given.keywords}
        if given.device is None and len(cards) > 1:
            return api.survey_plans(
                model, effective_batch_size, gpus=cards, progress=bar.stage, **options
            )
        return api.plan(
            model,
            effective_batch_size,
            device=given.device,
            gpu=cards[0] if cards else None,
            progress=bar.trial,
            **options,
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
            lines = emitted(found[0], self._trainer)
            click.echo(err=True)
            click.echo(lines, nl=False)


def _page(found: Plan | PlanSurvey | Exploration) -> str:
    from memfit.reports import exploration_page, plan_page

    if isinstance(found, Plan):
        return plan_page.page(found)
    if isinstance(found, PlanSurvey):
        return plan_page.survey_page(found)
    return exploration_page.page(found)
