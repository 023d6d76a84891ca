"""Runs the iterations of a training step on its device.

`memfit.step.workload` describes a step and builds it. An iteration runs micro-batches forward and
backward, takes the optimizer's step, and zeroes the gradients. `memfit.step.calling` calls the
model.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from memfit._torch_private import is_compiled
from memfit.errors import WorkloadError
from memfit.records import Precision
from memfit.step.calling import call_model, users_code
from memfit.step.draws import Draws

__all__ = [
    "PrecisionPolicy",
    "PreparedStep",
    "added",
    "autocast",
    "check_loss",
]

_AUTOCAST_DTYPES = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}


# Every module has these, and torch fills them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class PrecisionPolicy(Protocol):
    """How a step computes in mixed precision, with the functions of autocast and GradScaler."""

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model and the loss run."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from the loss. The loss is scaled if the precision needs it."""

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step. Its state exists afterwards."""


class _TorchPrecision:
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
        return autocast(self._device, self._precision)

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < before:
            # The scaler skipped the step because of an overflow. Later steps of a training are not
            # skipped, and then the optimizer's state exists.
            optimizer.step()


class PreparedStep:
    """A training step on its device: model, batches, loss, optimizer.

    Args:
        model: The model, on its device.
        make_batch: A function from a batch size to the model's inputs and the loss's targets.
        loss: A function from outputs and targets to one number, or to several that are added.
        make_optimizer: A function that returns the optimizer that a trial begins with.
        device: The device of all of these.
        precision: The precision of the step, not `AUTO`.
        num_micro_batches: The number of micro-batches in one iteration.
        precision_policy: Replaces torch's autocast and GradScaler.

    `peak_varies` says of the last trial that its peak depended on what the step drew.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        make_batch: Callable[[int], tuple[Any, tuple[Any, ...]]],
        loss: Callable[..., torch.Tensor],
        make_optimizer: Callable[[], Optimizer],
        device: torch.device,
        precision: Precision,
        num_micro_batches: int,
        precision_policy: PrecisionPolicy | None = None,
    ) -> None:
        if precision is Precision.AUTO:
            raise ValueError("a prepared step needs a precision that was chosen")
        self.model = model
        self.num_micro_batches = num_micro_batches
        self.make_batch = make_batch
        self._loss = loss
        self._make_optimizer = make_optimizer
        self.precision_policy = precision_policy or _TorchPrecision(device, precision)
        self._optimizer: Optimizer | None = None
        self._had_state = False
        self._draws: Draws | None = None
        self.peak_varies = False

    @contextlib.contextmanager
    def drawing(self, draws: Draws) -> Iterator[None]:
        """Count and force the draws of forward, loss and backward in the iterations of the block.

        Compiled code is not watched, because it would have to be compiled again.

        Args:
            draws: Counts the draws, and forces them if it has a share.
        """
        is_plain = not any(map(is_compiled, self.model.modules()))
        self._draws = draws if is_plain else None
        try:
            yield
        finally:
            self._draws = None

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss if it is a module, which may have parameters and buffers; else `None`."""
        return self._loss if isinstance(self._loss, nn.Module) else None

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that exists before an iteration begins, some more than once.

        These are parameters and buffers, other tensors that the modules keep in attributes and
        containers, and the optimizer's parameters and state.
        """
        for root in (self.model, self.loss_module):
            for module in () if root is None else root.modules():
                yield from module.parameters(recurse=False)
                yield from module.buffers(recurse=False)
                for name, value in vars(module).items():
                    if name not in _OF_EVERY_MODULE and not isinstance(value, nn.Module):
                        yield from _tensors_in(value)
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                yield from group["params"]
            for state in self._optimizer.state.values():
                yield from _tensors_in(state)

    def begin(self) -> None:
        """Start as training does, with the optimizer as it was given and without gradients.

        Raises:
            WorkloadError: The optimizer steps only with a closure.
        """
        self._optimizer = self._make_optimizer()
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise WorkloadError(
                "LBFGS runs the step several times, through a closure. memfit runs "
                "each step once. Give an optimizer whose step takes no closure."
            )
        self._had_state = bool(self._optimizer.state)
        self._drop_gradients()

    def end(self) -> None:
        """Drop the gradients, the optimizer, and the state that it has gained."""
        if self._optimizer is not None and not self._had_state:
            self._optimizer.state.clear()
        self._optimizer = None
        self._drop_gradients()

    def iterate(self, batch_size: int) -> None:
        """Run one iteration: every micro-batch forward and backward, step, gradients zeroed.

        Args:
            batch_size: Samples in each micro-batch, at least 1.

        Raises:
            WorkloadError: The loss is not one number that has a gradient.
        """
        self.accumulate(batch_size)
        self.update()

    def accumulate(self, batch_size: int) -> None:
        """Run the first part of an iteration: every micro-batch forward and backward.

        Args:
            batch_size: Samples in each micro-batch, at least 1.

        Raises:
            WorkloadError: The loss is not one number that has a gradient.
        """
        if self._optimizer is None:
            self.begin()
        with users_code():
            for _ in range(self.num_micro_batches):
                self._backward(batch_size)

    def update(self, *, set_to_none: bool = True) -> None:
        """Run the second part: the optimizer's step, and gradients zeroed.

        Args:
            set_to_none: Whether to drop the gradients. If not, they are filled with zeros.
        """
        assert self._optimizer is not None
        with users_code():
            self.precision_policy.step(self._optimizer)
            self._optimizer.zero_grad(set_to_none=set_to_none)

    def step_on_zeros(self) -> None:
        """Let the optimizer take a step on gradients of zero, so that its state exists."""
        assert self._optimizer is not None
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        try:
            self._optimizer.step()
        finally:
            # This also runs if the optimizer refused them. Some take only sparse gradients.
            for parameter in parameters:
                parameter.grad = None

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state."""
        if self._optimizer is None:
            return 0
        return sum(
            value.untyped_storage().nbytes()
            for values in self._optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )

    def _generators(self) -> Iterator[random.Random]:
        """Yield Python's generators that the model owns, each once."""
        owned = {
            id(value): value
            for module in self.model.modules()
            for value in vars(module).values()
            if isinstance(value, random.Random)
        }
        yield from owned.values()

    def _drop_gradients(self) -> None:
        for module in (self.model, self.loss_module):
            if module is not None:
                module.zero_grad(set_to_none=True)

    def _backward(self, batch_size: int) -> None:
        inputs, targets = self.make_batch(batch_size)
        with (
            contextlib.nullcontext()
            if self._draws is None
            else self._draws.watched(*self._generators())
        ):
            with self.precision_policy.forward():
                loss = self._loss(call_model(self.model, inputs), *targets)
            loss = added(loss)
            check_loss(loss)
            self.precision_policy.backward(loss / self.num_micro_batches)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value that modules and optimizers keep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Mapping):
        yield from _tensors_in(tuple(value.values()))


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[None]:
    """Return the context in which forward and the loss run with a precision on a device."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return context


def added(losses: Any) -> Any:
    """Return the sum of several losses (a mapping, tuple or list), or a single loss itself."""
    several = tuple(losses.values()) if isinstance(losses, Mapping) else losses
    if not isinstance(several, (tuple, list)) or not several:
        return losses
    for loss in several:
        check_loss(loss)
    return torch.stack([loss.reshape(()) for loss in several]).sum()


def check_loss(loss: object) -> None:
    """Refuse a loss that `backward` cannot begin with.

    Raises:
        WorkloadError: The loss is not one number that has a gradient.
    """
    if not isinstance(loss, torch.Tensor):
        raise WorkloadError(f"The loss must be a tensor of one number, not {type(loss).__name__}.")
    if loss.numel() != 1:
        raise WorkloadError(
            f"The loss has the shape {tuple(loss.shape)}, but backward needs a "
            "single number. End the loss with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise WorkloadError("The loss has no gradient: it does not depend on the parameters.")
