"""A way to see the gradients that an optimizer step was taken on, and to compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class GradientRecorder:
    """Keeps the gradients of each step of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.steps: list[list[torch.Tensor | None]] = []
        optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.steps.append([None if p.grad is None else p.grad.clone() for p in parameters])


def relative_error(ours: list[torch.Tensor | None], reference: list[torch.Tensor | None]) -> float:
    """Return the largest relative distance of two lists of gradients, parameter by parameter."""
    errors = []
    for one, other in zip(ours, reference, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None and not torch.equal(one, other):
            errors.append(float((one - other).norm() / other.norm()))
    return max(errors, default=0.0)


def full_batch_gradients(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Return what one backward pass over the whole batch leaves in the parameters."""
    optimizer.zero_grad()
    loss().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    optimizer.zero_grad()
    return gradients
