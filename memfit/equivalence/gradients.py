"""Gradients of one batch, cut in different ways, and what rounding can make of the difference.

Two gradients of the same batch are compared parameter by parameter, against a bound that has three
terms, each of which is there for a reason:

- Every micro-batch's gradient is rounded when it is written, and again where it is added to those
  before: u x sqrt(sum ||t_i||^2 + sum ||s_i||^2 + ||b||^2), where u is the unit roundoff of the
  type that gradients are written in, t_i the weighted gradients of the micro-batches and s_i their
  partial sums, as measured.
- Inside each, n summands (samples x values of a sample) are added in the accumulator's type:
  v x sqrt(n) x the same norm, as random-walk rounding has it.
- Rounding that layers amplify on the way: the reference is computed once more with its samples in
  another order, which changes nothing but rounding, and a multiple of that difference is allowed.

Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
    Comput. 41(5), 2019, for sqrt(n) in place of n.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memfit import batches
from memfit.cleanup import rewound
from memfit.equivalence.cuts import spans
from memfit.equivalence.randomness import Draws
from memfit.errors import WorkloadError
from memfit.records import GradientCheck, ParameterDifference, Precision
from memfit.workload import autocast, call_model, check_loss

__all__ = ["FP64", "Bench", "Gradients", "check", "gradients"]

FP64 = "fp64"

_NUM_LISTED = 20
_PERMUTATION_FACTOR = 4.0  # the two differences have the same spread; four of them miss 1 in 10^4
_SCALE_SIGMAS = 5.0
_MIN_INDEPENDENT = 16
_NUM_LOOKED_AT = 65_536
_FIRST_LOSS_SCALE = 2.0**16  # as torch.amp.GradScaler's
_UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_TF32_ROUNDOFF = 2.0**-11


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
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
            WorkloadError: The loss is not one number with a gradient, or not finite; or the model
                takes no batch of one sample.
        """
        inputs = batches.take(self.inputs, start, stop)
        targets = batches.take(self.targets, start, stop)
        context = contextlib.nullcontext() if self.precision is None else autocast(
            self.device, self.precision
        )
        try:
            with context:
                loss = self.loss(call_model(self.model, inputs), *targets)
        except ValueError as error:
            if stop - start > 1:
                raise
            raise WorkloadError(
                f"The model takes no micro-batch of one sample ({error}); give a larger "
                "micro-batch size, or freeze its batch statistics."
            ) from error
        check_loss(loss)
        if not bool(torch.isfinite(loss.detach()).all()):
            raise WorkloadError(
                f"The loss is {loss.item()} in {self.precision_name}, so there are no gradients to "
                "compare: check the model's weights and the example batch."
            )
        return loss

    def reordered(self, order: torch.Tensor) -> Bench:
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
    bench: Bench,
    cut: Sequence[int],
    *,
    weights: Sequence[float],
    order: torch.Tensor | None = None,
    after_forward: Callable[[], None] | None = None,
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
        WorkloadError: As `Bench.loss_of`, or the gradients overflow at every loss scale.
    """
    loss_scale = _FIRST_LOSS_SCALE if bench.precision is Precision.AMP_FP16 else 1.0
    while True:
        result = _pass(bench, cut, weights, loss_scale, order, after_forward)
        # The squares are sums, so one that is not finite shows there; as the scaler would, go on
        # with a smaller scale, the same for every micro-batch.
        if bench.precision is not Precision.AMP_FP16 or loss_scale <= 1 or _finite(result):
            return result
        loss_scale /= 2**4


def _finite(result: Gradients) -> bool:
    return all(math.isfinite(square) for square in result.written_squares.values())


def _pass(
    bench: Bench,
    cut: Sequence[int],
    weights: Sequence[float],
    loss_scale: float,
    order: torch.Tensor | None,
    after_forward: Callable[[], None] | None,
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
            with draws:
                loss = bench.loss_of(start, stop)
                (loss * (weight * loss_scale)).backward()
            del loss
            if after_forward is not None:
                after_forward()
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
    dense = grad.to_dense() if grad.layout is not torch.strided else grad
    host = dense.detach().cpu()
    return host if loss_scale == 1 else host / loss_scale


@contextlib.contextmanager
def _squares_noted(
    parameters: dict[str, nn.Parameter], squares: dict[str, list[torch.Tensor]]
) -> Iterator[None]:
    """Note the squared norms of what is added to each gradient, and of what it then is."""

    def square(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        norm = torch.linalg.vector_norm(tensor.detach(), dtype=_wide(tensor.dtype))
        return norm.double().square()

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


def check(
    bench: Bench,
    reference: Gradients,
    other: Gradients,
    *,
    shuffled: Gradients,
    reference_cut: tuple[int, ...],
    cut: tuple[int, ...],
    message: str | None = None,
) -> GradientCheck:
    """Compare two gradients of one effective batch.

    Args:
        bench: What was run.
        reference: The full batch's gradients.
        other: Those of the batch cut otherwise.
        shuffled: The reference's again, with the samples in another order.
        reference_cut: How the reference was cut; a single micro-batch where it was not.
        cut: How the other was cut.
        message: Why the reference is cut, where it is.

    Returns:
        The comparison.
    """
    rounding = _Rounding.of(bench)
    values = [value for value in reference.values.values() if value is not None]
    total = math.sqrt(sum(_norm(value) ** 2 for value in values))
    typical = total / math.sqrt(max(1, sum(value.numel() for value in values)))
    compared = [
        _difference(
            name,
            reference.values[name],
            other.values[name],
            shuffled.values[name],
            written=math.sqrt(reference.written_squares[name] + other.written_squares[name]),
            typical=typical,
            rounding=rounding,
        )
        for name in reference.values
        if not (reference.values[name] is None and other.values[name] is None)
    ]
    compared.sort(key=_excess, reverse=True)
    return GradientCheck(
        precision=bench.precision_name,
        device=str(bench.device),
        reference=reference_cut,
        cut=cut,
        unit_roundoff=rounding.written,
        num_summands=rounding.num_summands,
        num_parameters=len(compared),
        num_differing=sum(difference.differs for difference in compared),
        worst=tuple(compared[:_NUM_LISTED]),
        worst_relative_error=max((d.relative_error for d in compared), default=0.0),
        message=message,
    )


def _excess(difference: ParameterDifference) -> float:
    errors = [difference.relative_error / difference.bound if difference.bound else math.inf]
    if difference.relative_error == 0:
        errors = [0.0]
    if difference.scale is not None and difference.scale_bound:
        errors.append(abs(difference.scale - 1) / difference.scale_bound)
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rounding:
    """Unit roundoffs of a check: of what is written, and of the sums inside."""

    written: float
    summed: float
    num_summands: int

    @property
    def vanishing(self) -> float:
        """The share of a typical gradient at which one is nothing but rounding."""
        return self.summed * math.sqrt(self.num_summands)

    @classmethod
    def of(cls, bench: Bench) -> _Rounding:
        per_sample = max(
            (
                leaf.numel() // bench.num_samples
                for leaf in torch.utils._pytree.tree_leaves((bench.inputs, bench.targets))
                if isinstance(leaf, torch.Tensor)
            ),
            default=1,
        )
        written = {
            None: 2.0**-53,
            Precision.FP32: 2.0**-24,
            Precision.AMP_BF16: 2.0**-8,
            Precision.BF16: 2.0**-8,
            Precision.AMP_FP16: 2.0**-11,
        }[bench.precision]
        summed = 2.0**-53 if bench.precision is None else 2.0**-24
        if bench.precision is None and bench.draws.narrowed is not None:
            written = summed = _UNIT_ROUNDOFF[bench.draws.narrowed]
        if bench.precision is not None and bench.device.type == "cuda" and (
            torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        ):
            written = max(written, _TF32_ROUNDOFF)
        # A user's model may have weights of a narrower type than the precision says.
        for parameter in bench.parameters().values():
            written = max(written, _UNIT_ROUNDOFF.get(parameter.dtype, 0.0))
        return cls(
            written=written,
            summed=summed,
            num_summands=max(1, bench.num_samples * max(1, per_sample)),
        )


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=_double(tensor.dtype)))


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _difference(
    name: str,
    reference: torch.Tensor | None,
    other: torch.Tensor | None,
    shuffled: torch.Tensor | None,
    *,
    written: float,
    typical: float,
    rounding: _Rounding,
) -> ParameterDifference:
    if reference is None or other is None:
        # One of the two reached the parameter and the other did not.
        got = _norm(reference if reference is not None else other)  # type: ignore[arg-type]
        return ParameterDifference(
            name=name,
            relative_error=1.0 if got else 0.0,
            bound=0.0,
            scale=0.0 if got else None,
            scale_bound=0.0,
        )
    b, a = _flat(reference), _flat(other)
    noise = 0.0 if shuffled is None else _norm(_flat(shuffled) - b)
    norm, apart = _norm(b), _norm(a - b)
    usual = typical * math.sqrt(b.numel())
    vanishes = norm <= rounding.vanishing * usual
    unit = usual if vanishes else norm
    if unit == 0:
        return ParameterDifference(
            name=name, relative_error=apart, bound=0.0, scale=None, scale_bound=0.0, vanishes=True
        )
    summing = rounding.vanishing
    allowed = (rounding.written + summing) * written + summing * usual
    bound = (allowed + _PERMUTATION_FACTOR * noise) / unit
    scale = None if vanishes else float(torch.dot(a, b)) / norm**2
    scale_bound = bound
    if scale is not None:
        scale_bound *= min(1.0, _SCALE_SIGMAS / math.sqrt(_num_carrying(b)))
        if abs(scale - 1) > scale_bound:
            # Equal elements are rounded alike, so only different ones average out.
            alike = min(_num_carrying(b), _num_different(b))
            scale_bound = bound * min(1.0, _SCALE_SIGMAS / math.sqrt(alike))
    return ParameterDifference(
        name=name,
        relative_error=apart / unit,
        bound=bound,
        scale=scale,
        scale_bound=scale_bound,
        vanishes=vanishes,
    )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().reshape(-1).double()


def _num_carrying(gradient: torch.Tensor) -> float:
    """Return how many elements carry the gradient's norm; the roundings of so many average out."""
    squares = gradient.square()
    fourth = float(squares.square().sum())
    carrying = float(squares.sum()) ** 2 / fourth if fourth else 1.0
    return carrying if carrying > _MIN_INDEPENDENT else 1.0


def _num_different(gradient: torch.Tensor) -> int:
    return gradient[:: max(1, gradient.numel() // _NUM_LOOKED_AT)].unique().numel()
