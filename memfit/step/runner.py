"""A training step on its device, carried out iteration by iteration.

`memfit.step.workload` describes steps and makes them real; here they run: micro-batches forward and
backward, the optimizer's step, gradients zeroed. What a user's own code raises in them is marked.
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
from memfit.step.draws import Draws

__all__ = [
    "PrecisionPolicy",
    "PreparedStep",
    "added",
    "autocast",
    "call_model",
    "check_loss",
    "split_batch",
    "users_code",
]

_AUTOCAST_DTYPES = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}


# Every module has these, and torch fills them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class PrecisionPolicy(Protocol):
    """How a step computes in mixed precision: what it needs of autocast and GradScaler."""

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Return the context that model and loss run in."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from the loss, scaled where the precision asks for it."""

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step; its state exists afterwards."""


class _TorchPrecision:
    """torch's own autocast and GradScaler."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self._device = device
        self._precision = precision
        # Memory does not depend on the scale. From 1 the first steps do not overflow, so none is
        # skipped, and the optimizer's state is there when the peak is read.
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
            # The scaler skipped the step for an overflow; training will get past that, and then
            # the optimizer's state is there.
            optimizer.step()


class PreparedStep:
    """A training step on its device: model, batches, loss, optimizer.

    Args:
        model: The model, on its device.
        make_batch: From a batch size to the model's inputs and the loss's targets.
        loss: From outputs and targets to one number, or several that are added.
        make_optimizer: Gives the optimizer that a trial begins with.
        device: Where all of it is.
        precision: The arithmetic; not `AUTO`.
        num_micro_batches: Micro-batches in one iteration.
        precision_policy: Stands in for torch's autocast and GradScaler.

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
        """See, and force, what forward, loss and backward draw in the iterations of the block.

        What is compiled is left alone, because what is watched would be compiled anew.

        Args:
            draws: Counts them, and says where they are forced to.
        """
        is_plain = not any(map(is_compiled, self.model.modules()))
        self._draws = draws if is_plain else None
        try:
            yield
        finally:
            self._draws = None

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss, where it is a module: it may have parameters and buffers of its own."""
        return self._loss if isinstance(self._loss, nn.Module) else None

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that is there before an iteration begins, some more than once.

        Parameters and buffers, what else the modules keep in attributes and containers, and the
        optimizer's parameters and state.
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
        """Start as training does: an optimizer as it was given, no gradients.

        Raises:
            WorkloadError: The optimizer steps only with a closure.
        """
        self._optimizer = self._make_optimizer()
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise WorkloadError(
                "LBFGS runs the step again as often as it likes, through a closure, and memfit "
                "runs each step once: give an optimizer whose step takes no closure."
            )
        self._had_state = bool(self._optimizer.state)
        self._drop_gradients()

    def end(self) -> None:
        """Drop the gradients, and the optimizer with the state that it did not begin with."""
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
            set_to_none: Drop the gradients; otherwise they stay, filled with zeros.
        """
        assert self._optimizer is not None
        with users_code():
            self.precision_policy.step(self._optimizer)
            self._optimizer.zero_grad(set_to_none=set_to_none)

    def step_on_zeros(self) -> None:
        """Let the optimizer take a step on gradients of zero, so that its state is there."""
        assert self._optimizer is not None
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        try:
            self._optimizer.step()
        finally:
            # Also where the optimizer refused them, such as one that takes sparse gradients only.
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


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """Mark what the user's own step raises, for `memfit.cli` to tell it from a bug of memfit's."""
    try:
        yield
    except Exception as error:
        error.raised_in_step = True  # type: ignore[attr-defined]
        raise


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model: a mapping by its keys, a tuple or list one by one, else as it is."""
    with users_code():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        return model(inputs)


def split_batch(
    batch: Any,
    *,
    num_inputs: int = 1,
    is_one_each: Callable[[int], bool] = lambda _index: False,
) -> tuple[Any, tuple[Any, ...]]:
    """Split a batch into what a model takes and what a loss compares with.

    Args:
        batch: A tuple or list of inputs and targets, or anything else, which is all inputs.
        num_inputs: How many leading elements of a tuple or list are inputs.
        is_one_each: Whether an element is a list of one entry for each sample, which is one
            argument; other lists are lists of arguments.

    Returns:
        The inputs, and the targets one by one.
    """
    if not isinstance(batch, (tuple, list)):
        return batch, ()
    inputs, targets = batch[:num_inputs], tuple(batch[num_inputs:])
    if _is_list(targets) and not is_one_each(num_inputs):
        targets = tuple(targets[0])
    if num_inputs == 1 and not (_is_list(inputs) and is_one_each(0)):
        return inputs[0], targets
    return tuple(inputs), targets


def _is_list(elements: tuple[Any, ...] | list[Any]) -> bool:
    return len(elements) == 1 and isinstance(elements[0], (tuple, list))


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a precision runs forward and loss on a device."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return context


def added(losses: Any) -> Any:
    """Return the sum of several losses (a mapping, tuple or list), or the one that it is."""
    several = tuple(losses.values()) if isinstance(losses, Mapping) else losses
    if not isinstance(several, (tuple, list)) or not several:
        return losses
    for loss in several:
        check_loss(loss)
    return torch.stack([loss.reshape(()) for loss in several]).sum()


def check_loss(loss: object) -> None:
    """Refuse what `backward` cannot begin with.

    Raises:
        WorkloadError: The loss is not one number that has a gradient.
    """
    if not isinstance(loss, torch.Tensor):
        raise WorkloadError(f"The loss must be a tensor of one number, not {type(loss).__name__}.")
    if loss.numel() != 1:
        raise WorkloadError(
            f"The loss has the shape {tuple(loss.shape)}, and backward needs one number: end the "
            "loss with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise WorkloadError("The loss has no gradient: it does not depend on the parameters.")
