"""Options that several commands share: one decorator adds them, and one record has their values.

Commands pass the values on to the public functions, which check them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import click

from memfit.cli.commands import Switch, excluded
from memfit.cli.completion import complete_gpus, complete_models, complete_optimizers
from memfit.errors import UsageError
from memfit.records import Averaging, Engine, Evaluation, Parallel, Precision
from memfit.units import parse_value

__all__ = [
    "PRECISION",
    "Given",
    "JustGiven",
    "NumberRange",
    "WholeRange",
    "as_typed",
    "models_argument",
    "optional_models_argument",
    "parallel_option",
    "parse_model_kwargs",
    "shared_options",
    "world_size_option",
]

_Command = Callable[..., Any]
_Options = Mapping[str, Callable[[_Command], _Command]]

models_argument = click.argument(
    "models", metavar="MODEL...", nargs=-1, required=True, shell_complete=complete_models
)
optional_models_argument = click.argument(
    "models", metavar="MODEL...", nargs=-1, shell_complete=complete_models
)


world_size_option = click.option(
    "--world-size",
    type=int,
    default=1,
    show_default=True,
    metavar="RANKS",
    help="Try one rank of so many that train together. The card is rehearsed.",
)
parallel_option = click.option(
    "--parallel",
    type=click.Choice([choice.value for choice in Parallel]),
    help=(
        "How the ranks of --world-size share the model: DistributedDataParallel (the default), the "
        "same with gradient_as_bucket_view, or fully_shard on each block."
    ),
)


def as_typed(text: Any) -> Any:
    """Return the number; if the text is no number, return it, and memfit itself refuses it.

    Args:
        text: What the user wrote, or a value of a pyproject.toml.
    """
    if not isinstance(text, str):
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class WholeRange(click.IntRange):
    """A whole number in a range."""

    name = "whole number"  # click says that a value "is not a valid" one


class NumberRange(click.FloatRange):
    """A number in a range."""

    name = "number"


class JustGiven(click.Choice[str]):
    """A choice that may be left out. In a pyproject.toml, `true` then stands for the first one.

    `none` overrides a project's default.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the choice."""
        if isinstance(value, bool):
            return next(iter(self.choices)) if value else None
        if value == "none":
            return None
        return super().convert(value, param, ctx)


class _PrecisionName(click.Choice[str]):
    """A precision. The error for a wrong name has the nearest ones."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name."""
        del param, ctx
        return Precision.named(value).value


PRECISION = _PrecisionName([choice.value for choice in Precision])
"""A precision, as the type of an option."""

_STEP_OPTIONS: _Options = {
    "precision": click.option(
        "--precision",
        "--dtype",
        "precision",
        type=PRECISION,
        default=Precision.AUTO.value,
        help=(
            "Precision of the arithmetic. auto is amp-bf16 or amp-fp16 on a GPU, and fp32 on a CPU."
        ),
    ),
    "optimizer": click.option(
        "--optimizer",
        default="adamw",
        show_default=True,
        shell_complete=complete_optimizers,
        help="The name of an optimizer that timm knows, or such as torchao.AdamW8bit.",
    ),
    "image_size": click.option(
        "--image-size",
        metavar="PIXELS",
        help="Image size in pixels, such as 224, or 320x240 for height and width.",
    ),
    "num_classes": click.option(
        "--num-classes", type=int, help="Number of classes of the classifier."
    ),
    "channels_last": click.option(
        "--channels-last", cls=Switch, help="Train in the channels_last layout."
    ),
    "grad_checkpointing": click.option(
        "--grad-checkpointing",
        cls=Switch,
        help=("Gradient checkpointing: do not keep activations, compute them again in backward."),
    ),
    "model_kwargs": click.option(
        "--model-kwargs",
        multiple=True,
        metavar="KEY=VALUE",
        help="One more argument for timm.create_model. May be repeated.",
    ),
    "keeps_outputs": click.option(
        "--keep-outputs",
        "keeps_outputs",
        cls=Switch,
        help="The loop holds a batch, its outputs and loss until the next ones replace them.",
    ),
    "ema": click.option(
        "--ema",
        type=JustGiven([choice.value for choice in Averaging]),
        is_flag=False,
        flag_value=Averaging.DEVICE.value,
        help="Keep an average of the weights on the device, or with `--ema cpu` in host memory.",
    ),
    "frozen": click.option(
        "--frozen",
        multiple=True,
        metavar="PATTERN",
        help="Parameters that are not trained, such as 'layer1.*'; may be repeated.",
    ),
    "prefetch": click.option(
        "--prefetch",
        type=WholeRange(min=0),
        default=0,
        metavar="BATCHES",
        help="Batches that wait on the device besides the one that is used.  [default: 0]",
    ),
    "fused": click.option("--fused", cls=Switch, help="Use the optimizer's fused implementation."),
    "optimizer_in_backward": click.option(
        "--optimizer-in-backward",
        cls=Switch,
        help="Step each parameter as soon as its gradient is there, and free the gradient.",
    ),
    "evaluate": click.option(
        "--evaluate",
        type=JustGiven([choice.value for choice in Evaluation]),
        is_flag=False,
        flag_value=Evaluation.ALONE.value,
        help="A forward pass without gradients instead of training: with nothing but the model, or "
        "with `--evaluate in-training` beside the state of a training run.",
    ),
    "no_grad": click.option(
        "--no-grad",
        cls=Switch,
        help="Evaluate under no_grad(), which keeps autocast's copies, not inference_mode().",
    ),
    "checkpoint": click.option(
        "--checkpoint",
        multiple=True,
        metavar="BLOCK",
        help="A module that is recomputed in backward, such as 'blocks.0'; may be repeated. In "
        "`memfit plan`, auto chooses the fewest operations for which the plan fits.",
    ),
    "compile": click.option(
        "--compile", cls=Switch, help="Compile the model with torch.compile (not simulated)."
    ),
}

_DEVICE_OPTIONS: _Options = {
    "device": click.option(
        "--device",
        help=(
            "cuda, cuda:1 or cpu. The default is a GPU if there is one. If there "
            "is none, a GPU that is not here is taken."
        ),
    ),
    "gpus": click.option(
        "--gpu",
        "gpus",
        multiple=True,
        metavar="NAME",
        shell_complete=complete_gpus,
        help=(
            "A GPU, which need not be here (see `memfit gpus`), or `any` with "
            "--memory. May be repeated."
        ),
    ),
    "engine": click.option(
        "--engine",
        type=click.Choice([choice.value for choice in Engine]),
        default=Engine.AUTO.value,
        show_default=True,
        help=(
            "How a --gpu is tried. auto rehearses a single card where that is "
            "possible, and simulates several."
        ),
    ),
    "memory": click.option(
        "--memory",
        metavar="SIZE",
        help=(
            "Memory that training may use, such as 8GiB. On a GPU it caps "
            "PyTorch's allocator. On a CPU it is a limit on what a trial takes "
            "beyond the loaded process. With --gpu it is the memory that the card "
            "has."
        ),
    ),
}

_SEARCH_OPTIONS: _Options = {
    "headroom": click.option(
        "--headroom",
        type=as_typed,
        default=0.05,
        metavar="SHARE",
        show_default=True,
        help="Share of the memory that the recommended batch size keeps free.",
    ),
    "multiple_of": click.option(
        "--multiple-of",
        type=as_typed,
        default=1,
        metavar="NUMBER",
        show_default=True,
        help="Recommend a batch size that is a multiple of this number.",
    ),
    "max_batch_size": click.option(
        "--max-batch-size",
        type=as_typed,
        metavar="SAMPLES",
        help="The largest batch size to try.  [default: 65536]",
    ),
}


# A sweep takes lists of these.
_SWEPT = ("precision", "optimizer", "image_size")
# `profile` has no limit of memory, so there the option is the card's.
_MEMORY_OF_CARDS: _Options = {
    "memory": click.option(
        "--memory",
        metavar="SIZE",
        help=("Memory that each --gpu has, such as 8GiB, instead of the catalogue's figure."),
    )
}
_DEVICE_ONLY: _Options = {
    "device": click.option(
        "--device", help="cuda, cuda:1 or cpu. The default is a GPU if there is one."
    )
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user gave for the step, its place and the search.

    Args:
        device: The device of this machine, if one was named.
        gpus: The cards that were named.
        memory: What the step may use, or what the cards have.
        place: The options that say where the step is tried, beside `device` and `gpus`, as keyword
            arguments of the public functions.
        step: The options of the step, likewise.
        search: The options of the search, likewise.
    """

    device: str | None
    gpus: tuple[str, ...]
    memory: str | None
    place: Mapping[str, Any]
    step: Mapping[str, Any]
    search: Mapping[str, Any]

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the public functions, without `device` and the cards."""
        return {**self.place, **self.search, **self.step}


def shared_options(
    *,
    searches: bool = True,
    has_cards: bool = True,
    has_device: bool = True,
    swept: bool = False,
) -> Callable[[_Command], _Command]:
    """Give a command the options of a step and its place; it gets them as `given`, a `Given`.

    Args:
        searches: The command searches, so it also has the options of a search.
        has_cards: The command can try cards that are not in this machine.
        has_device: The command can try a device of this machine.
        swept: The command takes several cards, and lists of some options, which it adds itself.
    """
    place = _DEVICE_OPTIONS if has_cards else _DEVICE_ONLY
    if swept or not has_device:
        place = {name: option for name, option in place.items() if name != "device"}
    steps = {n: option for n, option in _STEP_OPTIONS.items() if not (swept and n in _SWEPT)}
    if not searches and has_cards:
        place = {**place, **_MEMORY_OF_CARDS}
    search = _SEARCH_OPTIONS if searches else {}

    def add(command: _Command) -> _Command:
        @functools.wraps(command)
        def gathering(**others: Any) -> Any:
            def taken(options: _Options) -> dict[str, Any]:
                return {name: others.pop(name) for name in options}

            where, step, bounds = taken(place), taken(steps), taken(search)
            _drop_excluded_default(where)
            step["model_kwargs"] = parse_model_kwargs(step["model_kwargs"])
            given = Given(
                device=where.pop("device", None),
                gpus=where.pop("gpus", ()),
                memory=where.get("memory"),
                place=where,
                step=step,
                search=bounds,
            )
            return command(given=given, **others)

        return _added({**place, **steps, **search}, gathering)

    return add


def _drop_excluded_default(where: dict[str, Any]) -> None:
    """Leave out a card of the project's defaults if a device was typed, and the other way round."""
    left_out = excluded(click.get_current_context())
    if "gpus" in left_out and "gpus" in where:
        where["gpus"] = ()
    if "device" in left_out and "device" in where:
        where["device"] = None


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
            raise UsageError(
                f"{pair!r} is not of the form KEY=VALUE. Write, for example, drop_path_rate=0.1."
            )
        arguments[key] = parse_value(text)
    return arguments


def _added(options: _Options, command: _Command) -> _Command:
    return functools.reduce(
        lambda inner, option: option(inner), reversed(tuple(options.values())), command
    )
