"""Gradients of one batch, accumulated over micro-batches as a training loop does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memfit.equivalence.randomness import Draws
from memfit.equivalence.splits import spans
from memfit.errors import WorkloadError
from memfit.memory.restore import rewound
from memfit.records import Precision
from memfit.step import batches
from memfit.step.runner import autocast, call_model, check_loss, users_code

__all__ = ["FP64", "CheckSetup", "Gradients", "SingleSampleError", "dense", "gradients"]

FP64 = "fp64"

_FIRST_LOSS_SCALE = 2.0**16  # as torch.amp.GradScaler's


class SingleSampleError(WorkloadError):
    """The model runs, but not on one sample alone: batch statistics of one are none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckSetup:
    """A model, its loss and one effective batch, on the device and in the precision of a check.

    Args:
        model: The model, converted and placed.
        loss: From outputs and targets to one number.
        inputs: What the model takes; tensors of shape (samples, ...).
        targets: What the loss compares with, one by one; tensors of shape (samples, ...).
        num_samples: Samples in the effective batch.
        device: Where all of it is.
        precision: The arithmetic; `None` for float64 throughout.
        draws: What the model draws at random.
    """

    model: nn.Module
    loss: Callable[..., torch.Tensor]
    inputs: Any
    targets: tuple[Any, ...]
    num_samples: int
    device: torch.device
    precision: Precision | None
    draws: Draws

    @property
    def precision_name(self) -> str:
        """What reports call the precision."""
        return FP64 if self.precision is None else self.precision.value

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The model, and the loss if it is a module."""
        return (self.model, *((self.loss,) if isinstance(self.loss, nn.Module) else ()))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        named = dict(self.model.named_parameters())
        if isinstance(self.loss, nn.Module):
            own = {id(parameter) for parameter in named.values()}
            named |= {
                f"loss.{name}": parameter
                for name, parameter in self.loss.named_parameters()
                if id(parameter) not in own
            }
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return copies of the model's buffers, by name."""
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def loss_of(self, start: int, stop: int) -> torch.Tensor:
        """Run samples `start` up to and without `stop` through model and loss.

        Raises:
            WorkloadError: The loss is not one number with a gradient, or not finite.
            SingleSampleError: The model takes no batch of one sample.
        """
        inputs = batches.take(self.inputs, start, stop)
        targets = batches.take(self.targets, start, stop)
        context = (
            contextlib.nullcontext()
            if self.precision is None
            else autocast(self.device, self.precision)
        )
        try:
            with context:
                loss = self.loss(call_model(self.model, inputs), *targets)
        except ValueError as error:
            if stop - start > 1:
                raise
            raise SingleSampleError(
                f"The model takes no micro-batch of one sample ({error})"
            ) from error
        check_loss(loss)
        if not bool(torch.isfinite(loss.detach()).all()):
            raise WorkloadError(
                f"The loss is {loss.item()} in {self.precision_name}, so there are no gradients to "
                "compare: check the model's weights and the example batch."
            )
        return loss

    def reordered(self, order: torch.Tensor) -> CheckSetup:
        """Return the same batch with its samples in another order."""
        return dataclasses.replace(
            self,
            inputs=batches.reordered(self.inputs, order),
            targets=tuple(batches.reordered(target, order) for target in self.targets),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What one pass over the effective batch left in the parameters.

    Args:
        values: By parameter, in host memory; `None` for a parameter that got no gradient.
        written_squares: By parameter, the squared norms of all that was rounded when it was
            written: each micro-batch's gradient and each partial sum.
        buffers: The model's buffers after the pass.
    """

    values: dict[str, torch.Tensor | None]
    written_squares: dict[str, float]
    buffers: dict[str, torch.Tensor]


def gradients(
    bench: CheckSetup,
    cut: Sequence[int],
    *,
    weights: Sequence[float],
    order: torch.Tensor | None = None,
) -> Gradients:
    """Accumulate the gradients of micro-batches as a training loop does.

    Everything but the parameters' `.grad` is as before afterwards, and those are `None`.

    Args:
        bench: What is run.
        cut: Samples in each micro-batch; they sum to the effective batch.
        weights: What each micro-batch's loss is multiplied by.
        order: In which order the bench has its samples, where it is not that of the recorded random
            draws. It takes a pass over parts of the batch before, to show whose draws are whose.
        after_forward: Called after each micro-batch.

    Returns:
        The gradients, unscaled.

    Raises:
        WorkloadError: As `CheckSetup.loss_of`, or the gradients overflow at every loss scale.
    """
    loss_scale = _FIRST_LOSS_SCALE if bench.precision is Precision.AMP_FP16 else 1.0
    while True:
        result = _pass(bench, cut, weights=weights, loss_scale=loss_scale, order=order)
        # The squares are sums, so one that is not finite shows there; as the scaler would, go on
        # with a smaller scale, the same for every micro-batch.
        if bench.precision is not Precision.AMP_FP16 or loss_scale <= 1 or _finite(result):
            return result
        loss_scale /= 2**4


def _finite(result: Gradients) -> bool:
    return all(math.isfinite(square) for square in result.written_squares.values())


def _pass(
    bench: CheckSetup,
    cut: Sequence[int],
    *,
    weights: Sequence[float],
    loss_scale: float,
    order: torch.Tensor | None,
) -> Gradients:
    parameters = bench.parameters()
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for parameter in parameters.values():
        parameter.grad = None
    whole = len(cut) == 1
    with rewound(*bench.modules), _squares_noted(parameters, squares):
        for (start, stop), weight in zip(spans(cut), weights, strict=True):
            if order is not None:
                draws = bench.draws.replayed_in(order)
            elif whole:
                draws = bench.draws.recorded()
            else:
                draws = bench.draws.replayed(start, stop)
            with draws, users_code():
                loss = bench.loss_of(start, stop)
                (loss * (weight * loss_scale)).backward()
            del loss
        buffers = bench.buffers()
    values: dict[str, torch.Tensor | None] = {}
    for name, parameter in parameters.items():
        grad = parameter.grad
        parameter.grad = None
        values[name] = None if grad is None else _to_host(grad, loss_scale)
    written = {
        name: float(torch.stack(noted).sum()) / loss_scale**2 if noted else 0.0
        for name, noted in squares.items()
    }
    return Gradients(values=values, written_squares=written, buffers=buffers)


def _to_host(grad: torch.Tensor, loss_scale: float) -> torch.Tensor:
    return dense(grad.detach()).cpu() / loss_scale


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient with all its zeros, which those of sparse embeddings leave out."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


@contextlib.contextmanager
def _squares_noted(
    parameters: dict[str, nn.Parameter], squares: dict[str, list[torch.Tensor]]
) -> Iterator[None]:
    """Note the squared norms of what is added to each gradient, and of what it then is."""

    def square(tensor: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(dense(tensor.detach()), dtype=_wide(tensor.dtype))
        squared: torch.Tensor = norm.double().square()
        return squared

    handles = []
    for name, parameter in parameters.items():
        noted = squares[name]
        # The default binds the list of this parameter, not of the loop's last.
        handles.append(
            parameter.register_hook(lambda grad, noted=noted: noted.append(square(grad)))
        )
        handles.append(
            parameter.register_post_accumulate_grad_hook(
                lambda p, noted=noted: noted.append(square(p.grad))
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128 if dtype is torch.complex128 else torch.complex64
    return dtype if dtype is torch.float64 else torch.float32
