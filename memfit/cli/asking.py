"""What the commands that ask about models have in common: which cards, and one model after another.

The rule for a machine without a GPU is `memfit.api.default_gpus`; here it is said in words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import click
from rich.console import Console

from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import PlanSurvey, Record, Survey
from memfit.reports.progress import Progress
from memfit.units import format_bytes, parse_bytes

__all__ = ["ask_each", "cards_for", "check_single", "refuse_unfit", "under_way"]

_Found = TypeVar("_Found")


def cards_for(*, device: str | None, gpus: tuple[str, ...], memory: str | None) -> tuple[str, ...]:
    """Return the cards to try, and say so where none was named.

    Names and sizes are checked before torch is imported, which takes seconds.

    Args:
        device: The device that was asked for, if any.
        gpus: The cards that were asked for.
        memory: What they have, if that was said.

    Returns:
        Names of the catalogue; none where a device is measured.

    Raises:
        UsageError: There is no such card, or no such size.
    """
    memory_bytes = None if memory is None else parse_bytes(memory)
    for name in gpus:
        find_gpu(name, total_bytes=memory_bytes)
    if gpus or device is not None:
        return gpus
    from memfit import api

    cards = api.default_gpus(memory)
    if len(cards) == 1 and memory_bytes is not None:
        click.echo(
            "There is no GPU here and none was named: simulating a card of "
            f"{format_bytes(memory_bytes)}. --device cpu measures on the CPU.",
            err=True,
        )
    return cards


def check_single(models: Sequence[str], **files: object) -> None:
    """Refuse to write what several models were found to take into a file that shows one.

    Args:
        models: The models that are asked about.
        **files: By option, what was given.

    Raises:
        UsageError: There are several models and such a file.
    """
    for option, given in files.items():
        if given and len(models) > 1:
            raise UsageError(f"--{option} shows one model, and there are {len(models)}: give one.")


def ask_each(models: Sequence[str], ask: Callable[[str], _Found]) -> Iterator[_Found]:
    """Ask about one model after another; one that does not fit is no reason to stop.

    Args:
        models: Names, all of them looked up before the first is asked about.
        ask: Asks about one.

    Yields:
        What was found, for every model that fits.

    Raises:
        UnknownModelError: timm has no model of one of the names.
        DoesNotFitError: One of the models did not fit; after all were asked about.
    """
    if len(models) == 1:
        yield ask(models[0])
        return
    from memfit.step.timm_models import check_model_name

    for model in models:
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
    """End with the exit code of what does not fit, where no card of a survey takes the model.

    Args:
        found: What was found and shown.

    Raises:
        DoesNotFitError: It is a survey without an answer.
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
    """Show progress on standard error, where it is a terminal, once two seconds have gone by.

    Args:
        what: What is under way.
    """
    with Progress(Console(stderr=True), what) as bar:
        yield bar
