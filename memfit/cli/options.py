"""The options of a training step, shared by the commands that try or trace one."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from memfit.errors import UsageError
from memfit.records import Precision

__all__ = ["parse_model_kwargs", "step_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

_STEP_OPTIONS = (
    click.option(
        "--precision",
        "--dtype",
        "precision",
        type=click.Choice([choice.value for choice in Precision]),
        default=Precision.AUTO.value,
        help="Arithmetic; auto is amp-bf16 or amp-fp16 on a GPU and fp32 on a CPU.",
    ),
    click.option(
        "--optimizer", default="adamw", show_default=True, help="Any optimizer name timm knows."
    ),
    click.option("--image-size", metavar="PIXELS", help="224, or 320x240 for height and width."),
    click.option("--num-classes", type=int, help="Size of the classifier."),
    click.option("--channels-last", is_flag=True, help="Train in the channels_last layout."),
    click.option("--grad-checkpointing", is_flag=True, help="Recompute activations in backward."),
    click.option(
        "--model-kwargs",
        multiple=True,
        metavar="KEY=VALUE",
        help="A further argument for timm.create_model; may be repeated.",
    ),
)


def step_options(command: _Command) -> _Command:
    """Give a command the options of a training step.

    Args:
        command: The function behind the command.

    Returns:
        The function, with `precision`, `optimizer`, `image_size`, `num_classes`, `channels_last`,
        `grad_checkpointing` and `model_kwargs` (pairs as text) among its parameters.
    """
    return functools.reduce(lambda inner, option: option(inner), reversed(_STEP_OPTIONS), command)


def parse_model_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value is a Python literal, or else text.

    Args:
        pairs: Text such as `"drop_rate=0.1"`.

    Returns:
        The arguments by name.

    Raises:
        UsageError: A pair has no equals sign, or no name before it.
    """
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"{pair!r} is no KEY=VALUE pair; write, say, drop_path_rate=0.1.")
        try:
            arguments[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[key] = text
    return arguments
