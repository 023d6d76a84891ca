"""Turns a caller's arguments into a checked `TrainingStep`, and chooses where it runs."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import torch
from typing_extensions import Unpack

from memfit.backends import device_of
from memfit.cards import ANY_GPU, COMMON_GPUS
from memfit.errors import UsageError
from memfit.integrations.objects import Subject, subject_of
from memfit.records import Averaging, Evaluation, Parallel, Precision, StepOptions
from memfit.step.refusals import check_subject
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload
from memfit.units import parse_count, parse_image_size

__all__ = [
    "StepKeywords",
    "Subject",
    "SubjectKeywords",
    "cards_instead",
    "check_accumulates",
    "chooses_blocks",
    "default_gpus",
    "describe",
    "has_gpu",
    "own_device",
    "refuse_rank",
    "taken",
]

_DEFAULT_OPTIMIZER = "adamw"
_CHOSEN = "auto"
# What the public functions take besides the step's options, for a question after a wrong name.
_BESIDES = ("gpu", "device", "memory", "engine", "headroom", "multiple_of", "max_batch_size")
_Choice = TypeVar("_Choice", bound=enum.Enum)


class StepKeywords(TypedDict, total=False):
    """The options of a training step, which every public function takes by keyword.

    `describe` checks them and makes them a `StepOptions`.

    Args:
        precision: `"fp32"`, `"amp-bf16"`, `"amp-fp16"`, `"bf16"`, or `"auto"` (the default): mixed
            precision on a GPU, `"fp32"` on a CPU.
        optimizer: A name that timm knows, by default `"adamw"`; a workload brings its own.
        image_size: Pixels, or height and width, for a timm model; by default the model's own size.
        num_classes: Classes of a timm model; by default the model's own number.
        channels_last: Train in `torch.channels_last`; off by default.
        grad_checkpointing: Recompute activations in backward, if the model can; off by default.
        model_kwargs: More arguments for `timm.create_model`.
        keeps_outputs: The loop holds a batch, its outputs and its loss until the next ones replace
            them; off by default.
        ema: Keep an average of the weights: True or `"device"` on the device, `"cpu"` in host
            memory; by default there is none.
        frozen: A pattern of parameter names that are not trained, such as `"layer1.*"`, or several.
        prefetch: Batches that wait on the device besides the one that is used; by default 0.
        fused: Use the optimizer's fused implementation; off by default.
        optimizer_in_backward: Take the optimizer's step for each parameter as soon as its gradient
            is there, and free the gradient; off by default.
        evaluate: Run a forward pass without gradients instead of training: True or `"alone"` with
            nothing but the model, `"in-training"` beside the state of a training run.
        no_grad: Evaluate under `torch.no_grad()` instead of `torch.inference_mode()`.
        compile: Compile the model with `torch.compile`; off by default. Each trial compiles for its
            own batch size. It cannot be simulated.
        checkpoint: Modules that are recomputed in backward: a name as in `named_modules()`, a
            pattern such as `"blocks.*"`, or several. For `plan`, `"auto"` chooses them.
    """

    precision: str | Precision
    optimizer: str
    image_size: int | str | tuple[int, int] | None
    num_classes: int | None
    channels_last: bool
    grad_checkpointing: bool
    model_kwargs: Mapping[str, Any] | None
    keeps_outputs: bool
    ema: bool | str | Averaging | None
    frozen: str | Sequence[str]
    prefetch: int
    fused: bool
    optimizer_in_backward: bool
    evaluate: bool | str | Evaluation | None
    no_grad: bool
    compile: bool
    checkpoint: str | Sequence[str]


class SubjectKeywords(StepKeywords, total=False):
    """The options of a training step, and what belongs to a trainer's own object.

    Args:
        datamodule: For a `LightningModule`: its `LightningDataModule`, or a loader. Default: the
            module's own `train_dataloader`.
        trainer: For a `LightningModule`: the `Trainer`, whose precision is taken.
        method: For a `LightningModule`: `"fit"` (the default), `"validate"`, `"test"` or
            `"predict"`, as for Lightning's `Tuner`. All but the first are evaluations.
    """

    datamodule: Any
    trainer: Any
    method: str | None


def taken(
    subject: Subject, options: SubjectKeywords, *, samples_per_step: int | None = None
) -> tuple[str | Workload, StepKeywords]:
    """Turn a trainer's own object into a workload.

    Args:
        subject: A timm model's name, a workload, or a trainer's own object.
        options: The caller's options.
        samples_per_step: Samples of one rank in an optimizer step, if that is planned.

    Returns:
        The subject, and the options of the step alone.

    Raises:
        UsageError: An option does not belong to the subject.
    """
    options = options.copy()
    method = options.pop("method", None)
    made = subject_of(
        subject,
        datamodule=options.pop("datamodule", None),
        trainer=options.pop("trainer", None),
        method=method,
        evaluate=options.get("evaluate"),
        samples_per_step=samples_per_step,
    )
    if method not in (None, "fit") and not options.get("evaluate"):
        options["evaluate"] = True
    if options.get("evaluate") and getattr(made, "evaluates_in_no_grad", False):
        options["no_grad"] = True
    return made, options


def describe(
    subject: str | Workload,
    *,
    accumulate: bool = False,
    parallel: str | Parallel | None = None,
    world_size: int = 1,
    **options: Unpack[StepKeywords],
) -> TrainingStep:
    """Check the arguments, and describe the training step.

    Args:
        subject: A timm model's name, or a workload.
        accumulate: Run two micro-batches before each optimizer step instead of one.
        parallel: How the ranks share the model. Default: `"ddp"` if there are several ranks.
        world_size: The number of ranks that train together; the step is that of the first.
        **options: The step's options.

    Returns:
        The step; its precision may still be `AUTO`.

    Raises:
        UsageError: An option is not valid, or the subject does not take it.
    """
    unknown = sorted(options.keys() - StepKeywords.__annotations__.keys())
    if unknown:
        raise TypeError(_unknown_option(unknown[0]))
    check_subject(subject, Workload)
    image_size, classes = options.get("image_size"), options.get("num_classes")
    return TrainingStep(
        subject=subject,
        options=StepOptions(
            precision=_precision(subject, options.get("precision", Precision.AUTO)),
            optimizer=_optimizer(subject, options.get("optimizer", _DEFAULT_OPTIMIZER)),
            image_size=None if image_size is None else parse_image_size(image_size),
            num_classes=None if classes is None else parse_count("num_classes", classes),
            channels_last=_switch("channels_last", options),
            grad_checkpointing=_switch("grad_checkpointing", options),
            accumulate=accumulate or (not isinstance(subject, str) and subject.accumulates),
            model_kwargs=_arguments(options.get("model_kwargs")),
            keeps_outputs=_switch("keeps_outputs", options),
            ema=_chosen("ema", Averaging, options.get("ema")),
            frozen=_patterns("frozen", options.get("frozen", ()), "parameter names"),
            prefetch=_whole("prefetch", options.get("prefetch", 0)),
            fused=_switch("fused", options),
            optimizer_in_backward=_switch("optimizer_in_backward", options),
            evaluate=_chosen("evaluate", Evaluation, options.get("evaluate")),
            no_grad=_switch("no_grad", options),
            compile=_switch("compile", options),
            checkpoint=_blocks(options.get("checkpoint", ())),
            **_ranks(parallel, world_size),
        ),
    )


def _unknown_option(name: str) -> str:
    """Return a message on an option that a function does not have."""
    if name in _BESIDES:
        # Other functions have it, but not this one.
        instead = (
            ". memfit.verify computes gradients on the CPU or on a GPU that is here (device), and "
            "functions for several cards take gpus=[...]"
        )
        return f"this function has no option {name!r}{instead if name == 'gpu' else ''}"
    near = difflib.get_close_matches(name, [*_BESIDES, *StepKeywords.__annotations__], n=1)
    hint = f"did you mean {near[0]}? A" if near else "a"
    return (
        f"there is no option {name!r}; {hint} training step has "
        f"{', '.join(StepKeywords.__annotations__)}"
    )


def refuse_rank(step: TrainingStep, where: str) -> None:
    """Refuse a step that is one rank of many, where the others cannot be left out.

    Args:
        step: The step.
        where: What tries the step, as the subject of a sentence.

    Raises:
        UsageError: The step is one rank of many.
    """
    options = step.options
    if options.parallel is not None:
        raise UsageError(
            f"{where} cannot try one rank of {options.world_size} "
            f"({options.parallel.value}). A rehearsed card can: name it with gpu (--gpu), with the "
            "engine 'rehearse'."
        )


def check_accumulates(step: TrainingStep, what: str) -> None:
    """Refuse a step whose gradients cannot be accumulated.

    Args:
        step: The step.
        what: What accumulates gradients, as the subject of a sentence.

    Raises:
        UsageError: The step evaluates, or frees each gradient at once.
    """
    options = step.options
    if options.evaluate is not None:
        raise UsageError(
            f"{what} accumulates gradients, and an evaluation has none: ask memfit.probe (memfit "
            "probe) with evaluate, or leave it out."
        )
    if options.optimizer_in_backward:
        raise UsageError(
            f"{what} accumulates gradients, and optimizer_in_backward keeps none: ask memfit.probe "
            "(memfit probe) for the largest batch of one step, or leave it out."
        )


def own_device(subject: str | Workload, device: str | None) -> str | None:
    """Return the device on which to train a subject.

    Args:
        subject: A timm model's name, or a workload, whose model is on a device already.
        device: The device that the caller named, if any.

    Returns:
        The device's name; `None` if neither the caller nor the workload names one.

    Raises:
        UsageError: A workload's model is on a device of another kind.
    """
    if isinstance(subject, str):
        return device
    own = subject.device
    if device is not None and device_of(device).type != own.type:
        raise UsageError(
            f"The model is on {own}, but the trials were asked for on {device}. "
            "Move the model first, and then make the optimizer."
        )
    return device or str(own)


def default_gpus(memory: str | float | None = None) -> tuple[str, ...]:
    """Return the cards to try if the caller names no device and no card.

    Args:
        memory: What the step may use, if given. Then the result is one card with that much memory.

    Returns:
        Names of the catalogue; empty on a machine with a GPU, because the GPU is measured.
    """
    if has_gpu():
        return ()
    return COMMON_GPUS if memory is None else (ANY_GPU,)


def cards_instead(
    subject: str | Workload,
    *,
    device: str | None,
    gpu: str | None,
    memory: str | float | None = None,
) -> tuple[str, ...]:
    """Return the cards to try a subject on if the caller named no card and no device.

    A CPU is measured only if the caller asks for it, because that takes minutes and gigabytes.

    Args:
        subject: A timm model's name, or a workload.
        device: The device that the caller named, if any.
        gpu: The card that the caller named, if any.
        memory: What the step may use, if given.

    Returns:
        Names of the catalogue; empty if a device or a named card is tried.

    Raises:
        UsageError: A workload's model is on the CPU of a machine with a GPU.
    """
    if device is not None or gpu is not None:
        return ()
    if not has_gpu():
        return default_gpus(memory)
    if not isinstance(subject, str) and subject.device.type == "cpu":
        raise UsageError(
            "The model is on the CPU, but this machine has a GPU. Move the model "
            "to the GPU first, and then make the optimizer. Or give device='cpu' "
            "to measure on the CPU."
        )
    return ()


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can train on."""
    return torch.cuda.is_available()


def _precision(subject: str | Workload, precision: str | Precision) -> Precision:
    if precision == Precision.AUTO.value and not isinstance(subject, str):
        precision = subject.own_precision
    return Precision.named(precision)


def _chosen(option: str, kind: type[_Choice], given: object) -> _Choice | None:
    """Return the choice with a name; the first one for True, and none for False."""
    if given is None or given is False:
        return None
    known = list(kind)
    if given is True:
        return known[0]
    try:
        return kind(given)
    except ValueError:
        names = " or ".join(repr(choice.value) for choice in known)
        raise UsageError(f"{option} is True, False, {names}, not {given!r}.") from None


def chooses_blocks(options: StepKeywords) -> bool:
    """Whether `checkpoint` is `"auto"`, so that a plan chooses the blocks.

    Raises:
        UsageError: It is combined with names, or with checkpointing of every block.
    """
    given = options.get("checkpoint", ())
    if _CHOSEN not in ((given,) if isinstance(given, str) else tuple(given or ())):
        return False
    if given != _CHOSEN and tuple(given) != (_CHOSEN,):
        raise UsageError("checkpoint is 'auto', or names of blocks, not both.")
    if options.get("grad_checkpointing"):
        raise UsageError(
            "grad_checkpointing recomputes every block, and checkpoint 'auto' chooses some: leave "
            "one of the two out."
        )
    return True


def _blocks(given: str | Sequence[str]) -> tuple[str, ...]:
    patterns = _patterns("checkpoint", given, "module names")
    if _CHOSEN in patterns:
        raise UsageError(
            "checkpoint 'auto' chooses blocks for the batch size of a plan: ask memfit.plan "
            "(memfit plan), and give its blocks here."
        )
    return patterns


def _ranks(parallel: str | Parallel | None, world_size: int) -> dict[str, Any]:
    """Return the options of a step that say which ranks it belongs to."""
    count = parse_count("The world size", world_size)
    if parallel is None and count == 1:
        return {}
    try:
        chosen = Parallel(parallel or Parallel.DDP)
    except ValueError:
        known = ", ".join(choice.value for choice in Parallel)
        raise UsageError(f"There is no parallel {parallel!r}; choose one of {known}.") from None
    return {"parallel": chosen, "world_size": count}


def _patterns(option: str, given: str | Sequence[str], of_what: str) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given)
    given_ones: tuple[object, ...] = patterns
    for pattern in given_ones:
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(
                f"{option} is a pattern of {of_what} such as 'layer1.*', or several, not "
                f"{pattern!r}."
            )
    return patterns


def _switch(option: str, options: Mapping[str, Any]) -> bool:
    given = options.get(option, False)
    if given is None or given in (True, False):
        return bool(given)
    raise UsageError(f"{option} is True or False, not {given!r}.")


def _arguments(given: object) -> tuple[tuple[str, Any], ...]:
    if given is None or isinstance(given, Mapping):
        return tuple((given or {}).items())
    raise UsageError(
        f"model_kwargs is a dictionary, such as {{'drop_path_rate': 0.1}}, not {given!r}."
    )


def _whole(option: str, given: object) -> int:
    return 0 if given == 0 and given is not False else parse_count(option, given)


def _optimizer(subject: str | Workload, optimizer: str) -> str | None:
    if isinstance(subject, str):
        return optimizer
    if optimizer != _DEFAULT_OPTIMIZER:
        raise UsageError(
            f"A workload brings its own optimizer; {optimizer!r} was given as well. Leave it out."
        )
    return subject.optimizer if isinstance(subject.optimizer, str) else None
