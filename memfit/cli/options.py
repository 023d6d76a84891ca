"""Options that several commands share. Commands pass them on to the public functions."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any

import click

from memfit.cli.completion import complete_gpus, complete_models
from memfit.errors import UsageError
from memfit.records import Engine, Precision

__all__ = [
    "device_options",
    "models_argument",
    "parse_model_kwargs",
    "profile_device_options",
    "search_options",
    "step_options",
]

_Command = Callable[..., Any]
_Options = Mapping[str, Callable[[_Command], _Command]]

models_argument = click.argument(
    "models", metavar="MODEL...", nargs=-1, required=True, shell_complete=complete_models
)

_STEP_OPTIONS: _Options = {
    "precision": click.option(
        "--precision",
        "--dtype",
        "precision",
        type=click.Choice([choice.value for choice in Precision]),
        default=Precision.AUTO.value,
        help="Arithmetic; auto is amp-bf16 or amp-fp16 on a GPU and fp32 on a CPU.",
    ),
    "optimizer": click.option(
        "--optimizer", default="adamw", show_default=True, help="Any optimizer name timm knows."
    ),
    "image_size": click.option(
        "--image-size", metavar="PIXELS", help="224, or 320x240 for height and width."
    ),
    "num_classes": click.option("--num-classes", type=int, help="Size of the classifier."),
    "channels_last": click.option(
        "--channels-last", is_flag=True, help="Train in the channels_last layout."
    ),
    "grad_checkpointing": click.option(
        "--grad-checkpointing", is_flag=True, help="Recompute activations in backward."
    ),
    "model_kwargs": click.option(
        "--model-kwargs",
        multiple=True,
        metavar="KEY=VALUE",
        help="A further argument for timm.create_model; may be repeated.",
    ),
}

_DEVICE_OPTIONS: _Options = {
    "device": click.option(
        "--device",
        help="cuda, cuda:1 or cpu; by default a GPU if there is one, else common GPUs are "
        "simulated.",
    ),
    "gpus": click.option(
        "--gpu",
        "gpus",
        multiple=True,
        metavar="NAME",
        shell_complete=complete_gpus,
        help="A GPU that need not be here (see `memfit gpus`), or `any` with --memory; may be "
        "repeated.",
    ),
    "engine": click.option(
        "--engine",
        type=click.Choice([choice.value for choice in Engine]),
        default=Engine.AUTO.value,
        show_default=True,
        help="How a --gpu is tried: auto rehearses one card where that is possible and simulates "
        "several.",
    ),
    "memory": click.option(
        "--memory",
        metavar="SIZE",
        help="What training may use, such as 8GiB: a cap on the GPU's allocator, or a limit beyond "
        "the loaded process on a CPU. What the card has, for a simulated one.",
    ),
}

_SEARCH_OPTIONS: _Options = {
    "headroom": click.option(
        "--headroom",
        type=float,
        default=0.05,
        show_default=True,
        help="Share of the memory that the recommendation keeps free.",
    ),
    "multiple_of": click.option(
        "--multiple-of",
        type=int,
        default=1,
        show_default=True,
        help="Recommend a multiple of this.",
    ),
    "max_batch_size": click.option(
        "--max-batch-size", type=int, help="Stop searching here.  [default: 65536]"
    ),
}


def profile_device_options(command: _Command) -> _Command:
    """Give `profile` the same options; its `memory` is the card's, because it has no limit."""
    memory = click.option(
        "--memory",
        metavar="SIZE",
        help="What each --gpu has, such as 8GiB, in place of the catalogue's figure.",
    )
    return _added({**_DEVICE_OPTIONS, "memory": memory}, command)


def device_options(command: _Command) -> _Command:
    """Give a command the options `device`, `gpus`, `engine` and `memory`."""
    return _added(_DEVICE_OPTIONS, command)


def search_options(command: _Command) -> _Command:
    """Give a command the options of the search, as a dictionary named `search`."""
    return _added(_SEARCH_OPTIONS, _gathering("search", _SEARCH_OPTIONS, command))


def step_options(command: _Command) -> _Command:
    """Give a command the options of a training step, as a dictionary named `step`."""

    @functools.wraps(command)
    def reading(*, step: dict[str, Any], **others: Any) -> Any:
        kwargs = parse_model_kwargs(step["model_kwargs"])
        return command(step={**step, "model_kwargs": kwargs}, **others)

    return _added(_STEP_OPTIONS, _gathering("step", _STEP_OPTIONS, reading))


def parse_model_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value that is not a Python literal is text.

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


def _gathering(
    parameter: str, options: _Options, command: Callable[..., Any]
) -> Callable[..., Any]:
    """Pass the values of several options to a command as one dictionary."""

    @functools.wraps(command)
    def gathered(**given: Any) -> Any:
        values = {name: given.pop(name) for name in options}
        return command(**{parameter: values}, **given)

    return gathered


def _added(options: _Options, command: _Command) -> _Command:
    return functools.reduce(
        lambda inner, option: option(inner), reversed(tuple(options.values())), command
    )
