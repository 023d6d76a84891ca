"""Gradients of one batch, accumulated over micro-batches as a training loop does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memfit.equivalence.counting import ignored_everywhere
from memfit.equivalence.randomness import Draws
from memfit.equivalence.samples import Samples, was_written_to
from memfit.equivalence.splits import spans
from memfit.equivalence.state import held_by, same_start
from memfit.equivalence.terms import named_losses
from memfit.errors import WorkloadError
from memfit.records import Precision
from memfit.step.calling import call_loss, call_model, users_code
from memfit.step.runner import autocast

__all__ = ["FP64", "CheckSetup", "Gradients", "SingleSampleError", "dense", "gradients"]

FP64 = "fp64"

_FIRST_LOSS_SCALE = 2.0**16  # the same as in torch.amp.GradScaler


class SingleSampleError(WorkloadError):
    """The model runs, but not on a single sample, which has no batch statistics."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckSetup:
    """A model, its loss and one effective batch, on the device and in the precision of a check.

    Args:
        model: The model, converted and placed.
        loss: A function of outputs and targets; it returns one number, or several by name.
        samples: The effective batch.
        device: The device of the model and the batch.
        precision: The precision of training; `None` for float64 throughout.
        draws: The random draws of the model.
    """

    model: nn.Module
    loss: Callable[..., Any]
    samples: Samples
    device: torch.device
    precision: Precision | None
    draws: Draws

    @property
    def precision_name(self) -> str:
        """The name of the precision in reports."""
        return FP64 if self.precision is None else self.precision.value

    @property
    def holders(self) -> tuple[object, ...]:
        """The objects that can keep state from pass to pass."""
        return (self.model, *held_by(self.loss, self.model))

    @property
    def num_samples(self) -> int:
        """Samples in the effective batch."""
        return self.samples.num_samples

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by name."""
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

    def losses_of(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Run the samples from `start` up to but not including `stop` through model and loss.

        Returns:
            The losses by name, each one number.

        Raises:
            WorkloadError: A loss is not one number, or none has a gradient.
            SingleSampleError: The model takes no batch of one sample.
        """
        inputs, targets = self.samples.of(start, stop)
        context = (
            contextlib.nullcontext()
            if self.precision is None
            else autocast(self.device, self.precision)
        )
        try:
            with context:
                returned = call_loss(self.loss, call_model(self.model, inputs), targets)
        except ValueError as error:
            if stop - start > 1:
                raise
            raise SingleSampleError(
                f"The model takes no micro-batch of one sample ({error})"
            ) from error
        if was_written_to((inputs, targets)):
            self.draws.batch_changed = True
        return named_losses(returned)

    def check_finite(self, loss: torch.Tensor) -> None:
        """Refuse a loss that is not finite, because it has no gradients.

        Raises:
            WorkloadError: The loss is not finite.
        """
        if not bool(torch.isfinite(loss.detach()).all()):
            ignored = ignored_everywhere(self.samples)
            if ignored is not None:
                raise WorkloadError(
                    f"The loss is {loss.item()} because the batch has no valid target: {ignored}. "
                    "Give an example batch with targets that count."
                )
            raise WorkloadError(
                f"The loss is {loss.item()} in {self.precision_name}, so there are no "
                "gradients to compare. Check the model's weights and the example batch."
            )

    def reordered(self, order: torch.Tensor) -> CheckSetup:
        """Return the same batch with its samples in another order."""
        return dataclasses.replace(self, samples=self.samples.picked(order.tolist()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """The gradients that one pass over the effective batch gave.

    Args:
        values: By parameter, in host memory; `None` for a parameter that got no gradient.
        written_squares: By parameter, the sum of squared norms of all values that were rounded when
            they were written: each micro-batch's gradient and each partial sum.
        buffers: The model's buffers after the pass.
    """

    values: dict[str, torch.Tensor | None]
    written_squares: dict[str, float]
    buffers: dict[str, torch.Tensor]


def gradients(
    setup: CheckSetup,
    cut: Sequence[int],
    *,
    weights: Sequence[Sequence[float]] | None = None,
    order: torch.Tensor | None = None,
    forgets: bool = False,
) -> Gradients:
    """Accumulate the gradients of micro-batches as a training loop does.

    Afterwards the state is the same as before, and the parameters' `.grad` is None.

    Args:
        setup: The step to run.
        cut: Samples in each micro-batch; they add up to the effective batch.
        weights: For each micro-batch the factors of its losses, in the order of the losses. A loss
            with the factor 0 contributes nothing, even if it is NaN. `None` for 1 everywhere.
        order: The order of the setup's samples, if it differs from the order in which random draws
            were recorded. A pass over parts of the batch must have run before, because it shows
            which draws belong to which samples.
        forgets: Restore everything except gradients after each micro-batch, unlike a training loop.

    Returns:
        The gradients, unscaled.

    Raises:
        WorkloadError: As in `CheckSetup.losses_of`; or a loss is not finite, or the gradients
            overflow at every loss scale.
    """
    loss_scale = _FIRST_LOSS_SCALE if setup.precision is Precision.AMP_FP16 else 1.0
    while True:
        result = _pass(
            setup, cut, weights=weights, loss_scale=loss_scale, order=order, forgets=forgets
        )
        # The squares are sums, so any value that is not finite shows in them. As the scaler would,
        # try again with a smaller scale, the same for every micro-batch.
        if setup.precision is not Precision.AMP_FP16 or loss_scale <= 1 or _finite(result):
            return result
        loss_scale /= 2**4


def _finite(result: Gradients) -> bool:
    return all(math.isfinite(square) for square in result.written_squares.values())


def _pass(
    setup: CheckSetup,
    cut: Sequence[int],
    *,
    weights: Sequence[Sequence[float]] | None,
    loss_scale: float,
    order: torch.Tensor | None,
    forgets: bool,
) -> Gradients:
    parameters = setup.parameters()
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for parameter in parameters.values():
        parameter.grad = None
    whole = len(cut) == 1
    with (
        same_start(setup.holders, parameters.values()) as put_back,
        _squares_noted(parameters, squares),
    ):
        for (start, stop), shares in zip(spans(cut), weights or (None,) * len(cut), strict=True):
            if order is not None:
                draws = setup.draws.replayed_in(order)
            elif whole:
                draws = setup.draws.recorded()
            else:
                draws = setup.draws.replayed(start, stop)
            with draws, users_code():
                loss = _weighted(setup, setup.losses_of(start, stop), shares)
                if loss is not None:
                    (loss * loss_scale).backward()
            del loss
            if forgets:
                put_back()
        buffers = setup.buffers()
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


def _weighted(
    setup: CheckSetup, losses: dict[str, torch.Tensor], shares: Sequence[float] | None
) -> torch.Tensor | None:
    """Return the sum of losses, each times its share; `None` if all shares are 0."""
    total = None
    for loss, share in zip(losses.values(), shares or (1.0,) * len(losses), strict=True):
        if share and loss.requires_grad:
            setup.check_finite(loss)
            total = loss * share if total is None else total + loss * share
    return total


def _to_host(grad: torch.Tensor, loss_scale: float) -> torch.Tensor:
    return dense(grad.detach()).cpu() / loss_scale


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient with all its zeros; gradients of sparse embeddings leave them out."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


@contextlib.contextmanager
def _squares_noted(
    parameters: dict[str, nn.Parameter], squares: dict[str, list[torch.Tensor]]
) -> Iterator[None]:
    """Record the squared norms of each value added to a gradient, and of each sum."""

    def square(tensor: torch.Tensor | None) -> torch.Tensor:
        if tensor is None:
            raise WorkloadError(
                "A hook of the model drops .grad during the backward pass, as an optimizer that "
                "steps in backward does. Then there is nothing to accumulate. Remove the hook."
            )
        norm = torch.linalg.vector_norm(dense(tensor.detach()), dtype=_wide(tensor.dtype))
        squared: torch.Tensor = norm.double().square()
        return squared

    handles = []
    for name, parameter in parameters.items():
        noted = squares[name]
        # The default value binds this parameter's list, not the list of the last one.
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
