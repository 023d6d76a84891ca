"""Shared by commands that take models: choosing cards, and trying one model after another.

`memfit.api.default_gpus` has the rule for a machine without a GPU. This module tells the user.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from memfit.cards import ANY_GPU, find_gpu
from memfit.cli.options import Given
from memfit.cli.subjects import is_place
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Engine, PlanSurvey, Record, Survey
from memfit.rehearsal.activate import load_without_card
from memfit.rehearsal.engines import engine_of
from memfit.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from memfit.cli.subjects import Subject
    from memfit.reports.progress import Progress

__all__ = ["ask_each", "cards_for", "check_cards", "check_single", "refuse_unfit", "under_way"]

_Found = TypeVar("_Found")


def cards_for(given: Given, models: Sequence[str]) -> tuple[str, ...]:
    """Return the cards to try, and tell the user if none was named.

    Names and sizes are checked before torch is imported, which takes seconds.

    Args:
        given: The options that the user gave.
        models: The models to try, as the user named them.

    Returns:
        Names of the catalogue; empty if a device is measured.

    Raises:
        UsageError: There is no such card, or the size is not valid.
    """
    memory_bytes = check_cards(given)
    if given.gpus or given.device is not None:
        _fork_ahead(given, models)
        return given.gpus
    from memfit import api

    cards = api.default_gpus(given.memory)
    if len(cards) == 1 and memory_bytes is not None:
        click.echo(
            "There is no GPU here and none was named, so memfit simulates a card "
            f"of {format_bytes(memory_bytes)}. To measure on the CPU, give --device "
            "cpu.",
            err=True,
        )
    return cards


def check_cards(given: Given) -> int | None:
    """Check the names and the size of cards before torch is imported, which takes seconds.

    Args:
        given: The options that the user gave.

    Returns:
        What `--memory` says, in bytes.

    Raises:
        UsageError: There is no such card, or the size is not valid.
    """
    memory_bytes = None if given.memory is None else parse_bytes(given.memory)
    for name in given.gpus:
        find_gpu(name, total_bytes=memory_bytes)
    return memory_bytes


def _fork_ahead(given: Given, models: Sequence[str]) -> None:
    """Import torch once for this process and the one that rehearses, if the latter will be needed.

    A user's own workload may look for a GPU of this machine, so it keeps a torch of its own.
    """
    if given.device is not None or any(map(is_place, models)):
        return
    engine = engine_of(given.place["engine"])
    if engine is Engine.SIMULATE or (engine is Engine.AUTO and len(given.gpus) > 1):
        return
    if given.gpus[0] == ANY_GPU:
        return
    memory_bytes = None if given.memory is None else parse_bytes(given.memory)
    if not load_without_card(find_gpu(given.gpus[0], total_bytes=memory_bytes)):
        return
    # What both processes need.
    from memfit import api  # noqa: F401
    from memfit.backends import cuda  # noqa: F401
    from memfit.backends.rehearsed.processes import end_forked, fork_ahead
    from memfit.step.timm_models import import_timm

    import_timm()
    fork_ahead()
    click.get_current_context().call_on_close(end_forked)


def check_single(models: Sequence[str], **files: object) -> None:
    """Refuse to write results of several models into a file that shows a single model.

    Args:
        models: The names of the models.
        **files: The given files, by option.

    Raises:
        UsageError: There are several models and such a file.
    """
    for option, given in files.items():
        if given and len(models) > 1:
            raise UsageError(f"--{option} shows one model, but {len(models)} were given. Give one.")


def ask_each(models: Sequence[Subject], ask: Callable[[Subject], _Found]) -> Iterator[_Found]:
    """Try one model after another; continue after a model that does not fit.

    Args:
        models: Names of models, or workloads. All names are looked up before the first is tried.
        ask: A function that tries one model.

    Yields:
        The result of every model that fits.

    Raises:
        UnknownModelError: timm has no model with one of the names.
        DoesNotFitError: One of the models did not fit; raised after all were tried.
    """
    if len(models) == 1:
        yield ask(models[0])
        return
    from memfit.step.timm_models import check_model_name

    for model in models:
        if isinstance(model, str):
            check_model_name(model)
    unfit: list[DoesNotFitError] = []
    for model in models:
        try:
            found = ask(model)
        except DoesNotFitError as error:  # noqa: PERF203 - every model is asked about
            click.echo(f"memfit: {error}", err=True)
            unfit.append(error)
        else:
            yield found
    if unfit:
        raise DoesNotFitError(f"{len(unfit)} of {len(models)} models do not fit.")


def refuse_unfit(found: Record) -> None:
    """End with the exit code for "does not fit" if the model fits no card of a survey.

    Args:
        found: The result that was shown.

    Raises:
        DoesNotFitError: The result is a survey in which no card fits.
    """
    if isinstance(found, Survey):
        fits = any(answer.result for answer in found.answers)
    elif isinstance(found, PlanSurvey):
        fits = any(answer.plan for answer in found.answers)
    else:
        return
    if not fits:
        raise DoesNotFitError(f"{found.subject} fits none of these cards, even at batch size 1.")


@contextlib.contextmanager
def under_way(what: str) -> Iterator[Progress]:
    """Show progress after two seconds on standard error, if it is a terminal.

    After Ctrl-C, the trials until then are printed there.

    Args:
        what: What runs, in a few words.
    """
    from rich.console import Console

    from memfit.reports.probe import trial_table
    from memfit.reports.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console, what)
    try:
        with bar:
            yield bar
    except KeyboardInterrupt:
        # They took time, and they say where to go on.
        if bar.trials:
            console.print("Tried until then:", trial_table(bar.trials), sep="\n")
        raise
