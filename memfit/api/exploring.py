"""`explore`: what a single change of the training step would make fit, by simulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from typing_extensions import Unpack

from memfit.api.planner import Target, plan_on
from memfit.api.probing import simulated
from memfit.api.searching import simulated_counterpart
from memfit.api.steps import StepKeywords, describe, own_device, step_on
from memfit.backends import open_backend
from memfit.backends.cuda import CudaBackend
from memfit.backends.simulated import SimulatedBackend, TraceCache
from memfit.errors import DoesNotFitError, UnsupportedError, UsageError
from memfit.records import Alternative, Exploration, Objective, Precision, StepOptions
from memfit.step import timm_models
from memfit.step.workload import TrainingStep, Workload
from memfit.units import format_bytes, parse_bytes

__all__ = ["explore"]

_LEAN_OPTIMIZER = "momentum"
_LEAN_OPTIMIZERS = ("momentum", "sgd", "sgdp", "sgdw", "nesterov", "lion", "adafactor")
_SMALLER_IMAGE = (3, 4)
# What patches and strides mostly come to, windows of 7 of them too; the first divisor is taken.
_IMAGE_UNITS = (32, 28, 16)


def explore(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    world_size: int = 1,
    objective: str | Objective = Objective.LARGEST,
    device: str | None = None,
    gpu: str | None = None,
    memory: str | int | None = None,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    **options: Unpack[StepKeywords],
) -> Exploration:
    """Simulate what single changes of a training step would make fit.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        effective_batch_size: As in `plan`.
        world_size: As in `plan`.
        objective: As in `plan`, but for `"fastest"`.
        device: A GPU of this machine to take the simulated card's name and memory from; by default
            the first, or a workload's own.
        gpu: A card of the catalogue instead.
        memory: What the card has, or what the step may use of one that is there.
        headroom: As in `plan`.
        multiple_of: As in `plan`.
        max_batch_size: As in `plan`.
        **options: As in `probe`.

    Returns:
        The step as it is and with one change each: what changes training least first.

    Raises:
        UsageError: Something asked for cannot be, or there is no GPU to simulate.
    """
    target = Target.of(
        effective_batch_size,
        world_size=world_size,
        objective=objective,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    if target.objective is Objective.FASTEST:
        target = dataclasses.replace(target, objective=Objective.LARGEST)
    memory_bytes = None if memory is None else parse_bytes(memory)
    described = describe(subject, **options)
    if gpu is not None:
        backend = simulated(gpu, memory_bytes, TraceCache())
    else:
        backend = _like(own_device(subject, device), memory_bytes)
    step = step_on(described, backend)
    return Exploration(
        subject=step.name,
        device=backend.device_name,
        capacity=backend.capacity(),
        effective_batch_size=target.effective_batch_size,
        world_size=target.world_size,
        baseline=_simulated(backend, step, target, change="", costs=""),
        alternatives=tuple(
            _simulated(backend, changed, target, change=change, costs=costs)
            for change, costs, changed in _changes(step, backend)
        ),
    )


def _like(device: str | None, memory_bytes: int | None) -> SimulatedBackend:
    """Return the model of a GPU that is there."""
    backend = open_backend(device, memory_bytes=memory_bytes)
    if not isinstance(backend, CudaBackend):
        raise UsageError(
            "What else would fit is simulated, and only GPUs can be: give gpu, a name of `memfit "
            "gpus`."
        )
    return simulated_counterpart(backend)


def _simulated(
    backend: SimulatedBackend, step: TrainingStep, target: Target, *, change: str, costs: str
) -> Alternative:
    reason = None
    try:
        plan = plan_on(backend, step, target)
    except (UsageError, UnsupportedError) as error:
        reason = str(error)
    except DoesNotFitError as error:
        needed = error.needed_bytes
        reason = str(error) if needed is None else f"needs {format_bytes(needed)} at batch size 1"
    else:
        return Alternative(
            change=change,
            costs=costs,
            options=plan.options,
            micro_batch_sizes=plan.micro_batch_sizes,
            recommended_micro_batch_size=plan.recommended_micro_batch_size,
            proved=plan.proved,
            peak_reserved_bytes=plan.peak_reserved_bytes,
        )
    return Alternative(change=change, costs=costs, options=step.options, reason=reason)


def _changes(
    step: TrainingStep, backend: SimulatedBackend
) -> Iterator[tuple[str, str, TrainingStep]]:
    """Yield single changes, those that change training least first."""
    options = step.options

    def changed(**fields: object) -> TrainingStep:
        return dataclasses.replace(step, options=dataclasses.replace(options, **fields))  # type: ignore[arg-type]

    if not options.channels_last:
        yield "channels last", "nothing but the layout", changed(channels_last=True)
    auto = backend.auto_precision
    if options.precision is Precision.FP32:
        yield auto.value, "rounding in forward and backward", changed(precision=auto)
    if not options.grad_checkpointing:
        yield (
            "gradient checkpointing",
            "a second forward pass in each step",
            changed(grad_checkpointing=True),
        )
    lean = _lean(step)
    if lean is not None:
        yield f"optimizer {_LEAN_OPTIMIZER}", "another optimizer, to be tuned anew", lean
    size = _smaller_image(step)
    if size is not None:
        yield "image {}x{}".format(*size), "other images", changed(image_size=size)


def _lean(step: TrainingStep) -> TrainingStep | None:
    """Return the step with an optimizer of one state for each parameter, if it has more."""
    if isinstance(step.subject, Workload):
        if not isinstance(step.subject.optimizer, str):
            return None
        if step.subject.optimizer in _LEAN_OPTIMIZERS:
            return None
        subject: str | Workload = dataclasses.replace(step.subject, optimizer=_LEAN_OPTIMIZER)
    elif step.options.optimizer in _LEAN_OPTIMIZERS:
        return None
    else:
        subject = step.subject
    options: StepOptions = dataclasses.replace(step.options, optimizer=_LEAN_OPTIMIZER)
    return TrainingStep(subject=subject, options=options)


def _smaller_image(step: TrainingStep) -> tuple[int, int] | None:
    """Return three quarters of a timm model's image, in sides that it takes."""
    if not isinstance(step.subject, str):
        return None
    size = step.options.image_size or timm_models.image_size_of(step.subject)
    if size is None:
        return None
    numerator, denominator = _SMALLER_IMAGE
    patches = timm_models.patches_of(step.subject, step.options)
    units = (u for u in (*_IMAGE_UNITS, *patches[:1]) if not any(u % patch for patch in patches))
    unit = next((u for u in units if all(side % u == 0 for side in size)), None)
    if unit is None:
        return None
    height, width = (max(side * numerator // denominator // unit * unit, unit) for side in size)
    return None if (height, width) == size else (height, width)
