"""`memfit plan --train-args`: the arguments of timm's train.py in place of a model and options."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from memfit.cli.commands import is_typed
from memfit.cli.options import Given
from memfit.errors import UsageError
from memfit.integrations.equal import equal_parts
from memfit.integrations.train_args import TrainArguments, read_train_arguments
from memfit.records import Plan

__all__ = ["changes_for", "given_by", "require_models"]


def require_models(models: tuple[str, ...], effective_batch_size: Any) -> None:
    """Refuse a plan without a model or without an effective batch.

    Raises:
        UsageError: One of them is missing.
    """
    if not models:
        raise UsageError("Name a model, such as resnet50, or give --train-args.")
    if effective_batch_size is None:
        raise UsageError("Give --effective-batch, the samples in each optimizer step.")


def given_by(
    text: str, context: click.Context, given: Given, *, models: tuple[str, ...]
) -> tuple[TrainArguments, Given]:
    """Return what train.py's arguments say, and the user's options with the step's replaced.

    Args:
        text: The arguments.
        context: The command that runs; it knows which options the user typed.
        given: The user's options.
        models: The models that the user named.

    Raises:
        UsageError: The user gave a model or an option of the step as well, or train.py has no such
            argument.
    """
    if models:
        raise UsageError(f"--train-args has the model: leave {models[0]} out.")
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in given.step and is_typed(context, name):
            raise UsageError(f"--train-args has the step's options: leave {parameter.opts[0]} out.")
    read = read_train_arguments(text)
    return read, dataclasses.replace(given, step={**given.step, **dict(read.keywords)})


def changes_for(plan: Plan, read: TrainArguments) -> list[str]:
    """Return the lines to print below a plan: the flags to change, and what the trials left out.

    Raises:
        UsageError: train.py takes equal parts only, and there are none near the plan's.
    """
    parts = equal_parts(plan, "timm's train.py")
    return [
        *parts.comments,
        read.changes(parts.micro_batch_size, parts.accumulation_steps),
        *read.remarks,
    ]
