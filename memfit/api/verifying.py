"""`verify`: do accumulated gradients equal the full batch's?"""

from __future__ import annotations

import dataclasses
import inspect

from typing_extensions import Unpack

from memfit import equivalence
from memfit.api.progress import StageProgress, watched
from memfit.api.steps import (
    Subject,
    SubjectKeywords,
    check_accumulates,
    describe,
    own_device,
    taken,
)
from memfit.backends import device_of, open_backend
from memfit.equivalence import AccumulationLoop
from memfit.errors import UsageError
from memfit.records import Equivalence, Precision
from memfit.units import parse_count

__all__ = ["verify"]

_LOOP_ARGUMENTS = ("model", "micro_batches", "loss", "optimizer")


def verify(
    subject: Subject,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    device: str | None = None,
    samples: int | None = None,
    freeze_bn: bool = False,
    accumulate: AccumulationLoop | None = None,
    progress: StageProgress = "bar",
    **options: Unpack[SubjectKeywords],
) -> Equivalence:
    """Prove that accumulated gradients equal the full batch's, or name what makes them differ.

    When this returns, raises or is interrupted, the user's model, optimizer, gradients, random
    states and switches are the same as before.

    Args:
        subject: A timm model's name, a `Workload` of the user's own objects, or a trainer's own
            object.
        micro_batch_size: Samples in each micro-batch, at least 1.
        accumulation_steps: Micro-batches before each optimizer step, at least 2.
        device: Where training runs, as for `probe`; float64 is always checked on the CPU.
        samples: The most samples that any comparison runs on; `None` for 8 in float64 and the
            whole effective batch in the precision of training.
        freeze_bn: Before gradients are compared, put layers that mix samples in evaluation mode, if
            they do not mix in that mode.
        accumulate: The user's own accumulation loop, `loop(model, micro_batches, loss, optimizer)`,
            to be checked as well. It runs each micro-batch through model and loss. It steps the
            optimizer after each window, or leaves the sum in `.grad`.
        progress: `"bar"`, `None`, or a function. It is called with the name of the next pass, the
            number of passes done, and the number of all passes.
        **options: As for `probe`; gradients do not depend on the optimizer.

    Returns:
        The verdict, every comparison, what mixes samples, and what the loop does wrong.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: Not even a micro-batch fits the device.
    """
    if accumulate is not None:
        _check_loop(accumulate)
    made, step_options = taken(subject, options)
    step = describe(made, **step_options)
    check_accumulates(step, "verify")
    if step.options.compile:
        raise UsageError(
            "verify watches single layers, which compiled code does not have: leave compile "
            "(--compile) out. Accumulation is the same with it."
        )
    step = describe(made, accumulate=True, **step_options)
    micro_batch_size = parse_count("The micro-batch size", micro_batch_size)
    accumulation_steps = parse_count("The accumulation steps", accumulation_steps)
    samples = None if samples is None else parse_count("samples", samples)
    place = device_of(own_device(made, device))
    if step.options.precision is Precision.AUTO:
        # Gradients need no limit on a CPU's memory, so any system will do.
        auto = Precision.FP32 if place.type == "cpu" else open_backend(place).auto_precision
        chosen = dataclasses.replace(step.options, precision=auto)
        step = dataclasses.replace(step, options=chosen)
    with watched(f"building {step.name}", stages=progress) as watching:
        return equivalence.verify(
            step,
            place,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            samples=samples,
            freeze_bn=freeze_bn,
            accumulate=accumulate,
            progress=watching.stage,
        )


def _check_loop(accumulate: AccumulationLoop) -> None:
    """Refuse a loop that cannot be called with the four arguments.

    Raises:
        UsageError: The loop is not a function, or it takes other arguments.
    """
    if not callable(accumulate):
        raise UsageError(
            f"accumulate must be a function that takes {', '.join(_LOOP_ARGUMENTS)}, "
            f"not {accumulate!r}."
        )
    try:
        signature = inspect.signature(accumulate)
    except ValueError:
        return  # a function written in C does not tell
    try:
        signature.bind(*_LOOP_ARGUMENTS)
    except TypeError as error:
        name = getattr(accumulate, "__name__", type(accumulate).__name__)
        raise UsageError(
            f"accumulate is called with {', '.join(_LOOP_ARGUMENTS)}, but {name}{signature} "
            f"takes other arguments: {error}."
        ) from error
