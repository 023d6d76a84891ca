"""How a step computes in its precision: autocast, the scale of the loss, the optimizer's step."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch.optim import Optimizer

from memfit.records import Precision

__all__ = ["PrecisionPolicy", "TorchPrecision", "autocast"]

_AUTOCAST_DTYPES = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}


class PrecisionPolicy(Protocol):
    """How a step computes in mixed precision, with the functions of autocast and GradScaler."""

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model and the loss run."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from the loss. The loss is scaled if the precision needs it."""

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step. Its state exists afterwards."""


class TorchPrecision:
    """torch's own autocast and GradScaler."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self._device = device
        self._precision = precision
        # Memory does not depend on the scale. With a scale of 1 the first steps do not overflow, so
        # no step is skipped, and the optimizer's state exists when the peak is read.
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=1.0, enabled=precision is Precision.AMP_FP16
        )

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Return autocast's context."""
        return autocast(self._device, self._precision)

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from the loss, scaled if a GradScaler is used."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step. Its state exists afterwards."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < before:
            # The scaler skipped the step because of an overflow. Later steps of a training are not
            # skipped, and then the optimizer's state exists.
            optimizer.step()


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[None]:
    """Return the context in which forward and the loss run with a precision on a device."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return context
