"""What the loops of the published runs did, and today's loops do not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from memfit.records import Action, Event
from memfit.simulation.tracing.trace import StepTrace
from memfit.step.timm_models import make_optimizer
from memfit.step.training_step import StepParts, TrainingStep

__all__ = ["ZeroFillingStep", "with_batch_of_bytes"]

# No allocation of a trace has this id; those of prefetched batches count down from -1.
_FIRST_ID = -1000


class ZeroFillingStep(TrainingStep):
    """A step of a timm model whose optimizer fills gradients with zeros (torch before 2.0)."""

    def parts(self, device: torch.device) -> StepParts:
        """Build the parts, with such an optimizer."""
        parts = super().parts(device)
        assert isinstance(parts.optimizer, str)
        name = parts.optimizer

        def made(_parameters: Any) -> torch.optim.Optimizer:
            optimizer = make_optimizer(parts.model, name)
            optimizer.zero_grad = _filling(optimizer.zero_grad)  # type: ignore[method-assign]
            return optimizer

        return dataclasses.replace(parts, optimizer=made)


def _filling(zero_grad: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(zero_grad)
    def fill(set_to_none: bool = True) -> None:
        del set_to_none
        zero_grad(set_to_none=False)

    return fill


def with_batch_of_bytes(trace: StepTrace, step: TrainingStep) -> StepTrace:
    """Return a trace with one batch more on the device, of bytes.

    timm's PrefetchLoader copies images as bytes and converts them on the device.

    Args:
        trace: The trace.
        step: What was traced.
    """
    inputs, targets = step.prepare(torch.device("meta")).make_batch(1)
    sizes = tuple(tensor.numel() for tensor in (inputs, *targets))
    setup = trace.schedule.setup
    events = tuple(
        Event(action=Action.ALLOC, id=_FIRST_ID - index, num_bytes=size * setup.batch_size)
        for index, size in enumerate(sizes)
    )
    longer = dataclasses.replace(
        setup, events=setup.events + events, growth_bytes=setup.growth_bytes + sizes
    )
    return dataclasses.replace(trace, schedule=dataclasses.replace(trace.schedule, setup=longer))
