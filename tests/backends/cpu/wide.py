"""A step whose memory is known: one MiB for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memfit import Workload
from memfit.records import Precision, StepOptions
from memfit.step.training_step import TrainingStep
from memfit.units import MIB

LIMIT = 200 * MIB
FP32 = StepOptions(precision=Precision.FP32)


class Wide(nn.Module):
    """Holds one MiB of activations for each sample."""

    def __init__(self, then: Callable[[torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something of the shape (samples, 2**18) that needs its input for backward."""
        out = x.expand(-1, 2**18) * self.scale
        if self.then is not None:
            self.then(out)
        return out


def wide_step(then: Callable[[torch.Tensor], Any] | None = None) -> TrainingStep:
    workload = Workload(
        Wide(then), lambda n: (torch.ones(n, 1),), lambda out: out.mean(), torch.optim.SGD
    )
    return TrainingStep(subject=workload, options=FP32)
