"""How the gradients of a step are computed and used: backward passes, clipping, the optimizer.

`Accumulator` calls a `Stepping`. The one here is that of a plain PyTorch loop. A trainer that has
its own backward pass, such as Accelerate, has another.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memfit.step.optimizers import stepped_by, without_closure

__all__ = ["PlainStepping", "Stepping"]


class Stepping(Protocol):
    """Backward passes, and what follows the last of them."""

    @property
    def is_scaled(self) -> bool:
        """Whether a scaler reads the gradients anyway, so that the host waits for the device."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's part of the loss."""
        ...

    def step(self) -> None:
        """Clip the gradients, step the optimizer, and step the scheduler."""
        ...

    def forget(self) -> None:
        """Forget what is known about the gradients of a step that failed."""
        ...


class PlainStepping:
    """The steps of a PyTorch loop.

    Args:
        optimizer: The optimizer.
        scaler: The `GradScaler`, if there is one.
        scheduler: Stepped after each optimizer step that was not skipped.
        clip_grad_norm: The norm that gradients are clipped to; `None` for no clipping.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler | None,
        scheduler: LRScheduler | None,
        clip_grad_norm: float | None,
    ) -> None:
        self._optimizer = optimizer
        self._scaler = scaler
        self._scheduler = scheduler
        self._clip_grad_norm = clip_grad_norm

    @property
    def is_scaled(self) -> bool:
        """Whether there is a scaler."""
        return self._scaler is not None

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's part of the loss, scaled if there is a scaler."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self) -> None:
        """Clip, step and schedule. The scaler skips a step whose gradients overflowed."""
        if self._clip_grad_norm is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(list(stepped_by(self._optimizer)), self._clip_grad_norm)
        is_skipped = False
        with without_closure(self._optimizer):
            if self._scaler is None:
                self._optimizer.step()
            else:
                scale = None if self._scheduler is None else self._scaler.get_scale()
                self._scaler.step(self._optimizer)
                self._scaler.update()
                is_skipped = scale is not None and self._scaler.get_scale() < scale
        if self._scheduler is not None and not is_skipped:
            self._scheduler.step()

    def forget(self) -> None:
        """Let the scaler forget that it unscaled gradients. It keeps its scale."""
        if self._scaler is not None:
            self._scaler.update(self._scaler.get_scale())
