"""Measures the weight that a user's own accumulation loop gives to each micro-batch.

The loop runs on windows of micro-batches. The gradient of each micro-batch is known before. An
optimizer that changes no parameters records the gradients that the loop hands to it. They are then
written as a weighted sum of the known gradients, and the weights show what the loop does. The loop
runs with all gradients scaled by a tiny and by a huge power of two. A loop that only adds and
divides gives the same weights for both; a loop that clips does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memfit.equivalence.gradients import CheckSetup, dense
from memfit.equivalence.randomness import seed_all
from memfit.equivalence.splits import spans
from memfit.equivalence.state import same_start
from memfit.equivalence.weighting import Weights
from memfit.errors import WorkloadError
from memfit.records import LoopFault, LoopWindow, LossWeighting

__all__ = ["AccumulationLoop", "weigh"]

AccumulationLoop = Callable[
    [nn.Module, Sequence[Any], Callable[..., torch.Tensor], torch.optim.Optimizer], object
]
"""A function `loop(model, micro_batches, loss, optimizer)` that trains on the micro-batches.

It runs each micro-batch, in the nesting of the workload's batch, through model and loss, and steps
the optimizer whenever a window is full; or it takes no step, and leaves the sum in `.grad`.
"""

_NUM_SKETCHED = 2048
_TINY, _HUGE = 2.0**-60, 2.0**60
_CLOSE = 1e-6
_NEGLIGIBLE = 1e-6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _SeenWindow:
    """The result of running a loop: a gradient for each step, and the gradients left at the end."""

    steps: tuple[torch.Tensor, ...]
    left: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Weighed:
    """One window's gradient as a weighted sum of its micro-batches' gradients."""

    cut: tuple[int, ...]
    expected: tuple[float, ...]
    weights: tuple[float, ...]
    carried: float
    residual: float
    relative_error: float

    @property
    def right(self) -> bool:
        return self.relative_error <= _CLOSE

    def follows(self, rule: Sequence[float]) -> bool:
        """Whether the weights follow a rule."""
        largest = max(abs(weight) for weight in rule)
        return all(abs(a - b) <= _CLOSE * largest for a, b in zip(self.weights, rule, strict=True))


class _NotingOptimizer(torch.optim.Optimizer):
    """Records the gradients at each step and changes no parameters."""

    def __init__(self, parameters: list[nn.Parameter], sketch: Callable[[], torch.Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3})
        self._sketch = sketch
        self.seen: list[torch.Tensor] = []

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen.append(self._sketch())
        return loss


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Weighing:
    """A loop, and the step and batch that it runs on."""

    loop: AccumulationLoop
    setup: CheckSetup
    weights: Weights
    parameters: tuple[nn.Parameter, ...]

    def micro_batches(self, cut: Sequence[int]) -> list[Any]:
        return [self.setup.samples.part(start, stop) for start, stop in spans(cut)]

    def sketch(self) -> torch.Tensor:
        """Return some elements of every parameter's gradient, of shape (elements,)."""
        parts = []
        for parameter in self.parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            flat = dense(grad.detach()).flatten()
            parts.append(flat[:: max(1, flat.numel() // _NUM_SKETCHED)].double())
        return torch.cat(parts)

    def known(self, cut: Sequence[int], weights: Sequence[Sequence[float]]) -> torch.Tensor:
        """Return each micro-batch's own gradient, of shape (elements, micro-batches).

        Several losses are added, each times its weight.
        """
        columns = []
        for span, shares in zip(spans(cut), weights, strict=True):
            self.clear()
            with same_start(self.setup.holders, self.parameters), torch.enable_grad():
                seed_all()
                losses = self.setup.losses_of(*span).values()
                kept = [loss * share for loss, share in zip(losses, shares, strict=True) if share]
                if kept:
                    sum(kept).backward()  # type: ignore[union-attr]
                columns.append(self.sketch())
        self.clear()
        return torch.stack(columns, dim=1).nan_to_num(0.0)

    def run(self, windows: Sequence[Sequence[int]], scale: float) -> _SeenWindow:
        """Run the loop over windows, with every gradient scaled."""
        micro_batches = [part for cut in windows for part in self.micro_batches(cut)]
        self.clear()
        optimizer = _NotingOptimizer(list(self.parameters), self.sketch)
        setup = self.setup
        with same_start(setup.holders), self._scaled(scale), torch.enable_grad():
            seed_all()
            self.loop(setup.model, micro_batches, setup.loss, optimizer)
            left = self.sketch()
        self.clear()
        if not optimizer.seen and not left.any():
            raise WorkloadError(
                "The accumulation loop left no gradient and took no optimizer step. It "
                "must train the model that it is given."
            )
        return _SeenWindow(steps=tuple(seen / scale for seen in optimizer.seen), left=left / scale)

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        handles = [
            parameter.register_hook(lambda grad: grad * scale) for parameter in self.parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def right(self, cut: Sequence[int]) -> torch.Tensor:
        """Return the correct gradient of a window."""
        weights = self.expected(cut)
        return self.known(cut, weights).sum(dim=1)

    def expected(self, cut: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        return self.weights.of(cut, self.setup.samples.first(sum(cut)))

    def weigh(
        self, seen: torch.Tensor, cut: tuple[int, ...], before: tuple[int, ...] | None = None
    ) -> _Weighed:
        """Write a gradient as a weighted sum over a window, and over the window before it."""
        expected = self.expected(cut)
        known = self.known(cut, tuple((1.0,) * len(shares) for shares in expected))
        right = self.right(cut)
        norm = float(torch.linalg.vector_norm(right)) or 1.0
        columns = known
        if before is not None:
            columns = torch.cat([known, self.right(before)[:, None]], dim=1)
        found = torch.linalg.lstsq(columns, seen[:, None], driver="gelsd").solution[:, 0]
        apart = float(torch.linalg.vector_norm(columns @ found - seen))
        return _Weighed(
            cut=cut,
            expected=tuple(shares[0] for shares in expected),
            weights=tuple(float(weight) for weight in found[: len(cut)]),
            carried=float(found[-1]) if before is not None else 0.0,
            residual=apart / (float(torch.linalg.vector_norm(seen)) or 1.0),
            relative_error=float(torch.linalg.vector_norm(seen - right)) / norm,
        )

    def clips_each(self, seen: torch.Tensor, plain: torch.Tensor) -> bool:
        """Whether the loop clips gradients before all micro-batches are added.

        If the whole gradient is clipped once by norm, every parameter's gradient keeps its
        direction. If it is clipped by value, its elements are cut off at one value.
        """
        limit = float(seen.abs().max())
        if torch.allclose(plain.clamp(-limit, limit), seen, rtol=_CLOSE, atol=_CLOSE * limit):
            return False
        start = 0
        for parameter in self.parameters:
            step = max(1, parameter.numel() // _NUM_SKETCHED)
            stop = start + -(-parameter.numel() // step)
            a, b = seen[start:stop], plain[start:stop]
            start = stop
            norms = float(torch.linalg.vector_norm(a)) * float(torch.linalg.vector_norm(b))
            if norms and float(torch.dot(a, b)) < (1 - _CLOSE) * norms:
                return True
        return False


def weigh(
    loop: AccumulationLoop,
    *,
    setup: CheckSetup,
    weights: Weights,
    micro_batch_size: int,
    accumulation_steps: int,
) -> tuple[tuple[LoopWindow, ...], tuple[LoopFault, ...]]:
    """Find out what an accumulation loop does with whole, uneven and short windows.

    Args:
        loop: The user's loop.
        setup: The step and its effective batch, in the nesting that the loop takes.
        weights: What the loss averages over.
        micro_batch_size: Samples in each micro-batch, as configured.
        accumulation_steps: Micro-batches in each window, as configured.

    Returns:
        The result for each window, and the faults of the loop.

    Raises:
        WorkloadError: The loop trains nothing.
    """
    weighing = _Weighing(
        loop=loop,
        setup=setup,
        weights=weights,
        parameters=tuple(setup.parameters().values()),
    )
    size, count = micro_batch_size, accumulation_steps
    less = max(1, size // 2)
    whole = (size,) * count
    uneven = (*whole[:-1], less)
    short = (*whole[: max(0, count - 2)], less) if count > 2 else (size,)  # noqa: PLR2004 - a pair

    faults: dict[LoopFault, None] = {}
    alone = weighing.run([whole], _TINY)
    if len(alone.steps) > 1:
        faults[LoopFault.STEPPED_TOO_OFTEN] = None
    steps = bool(alone.steps)
    weighed = [weighing.weigh(alone.steps[-1] if steps else alone.left, whole)]
    num_steps: list[int | None] = [len(alone.steps) if steps else None]
    for cut in (uneven, short):
        if not steps:
            weighed.append(weighing.weigh(weighing.run([cut], _TINY).left, cut))
            num_steps.append(None)
            continue
        seen = weighing.run([whole, cut], _TINY)
        taken = len(seen.steps) - len(alone.steps)
        num_steps.append(max(0, taken))
        if taken < 1:
            faults[LoopFault.MISSING_LAST_WINDOW] = None
            weighed.append(weighing.weigh(torch.zeros_like(seen.left), cut))
        else:
            weighed.append(weighing.weigh(seen.steps[-1], cut, before=whole))
    if LoopFault.STEPPED_TOO_OFTEN not in faults:
        for window, taken_steps in zip(weighed, num_steps, strict=True):
            if taken_steps != 0:
                faults |= dict.fromkeys(_faults_of(window, weights, count, size))
    if LoopFault.DIVIDED_BY_WRONG_COUNT in faults:
        # Windows of equal parts cannot tell the two faults apart.
        faults.pop(LoopFault.SCALED, None)
    if _clips_each(weighing, whole):
        faults[LoopFault.CLIPPED_PER_MICRO_BATCH] = None
    windows = tuple(
        LoopWindow(
            cut=window.cut,
            weights=window.weights,
            expected_weights=window.expected,
            residual=window.residual,
            relative_error=window.relative_error,
            num_steps=taken_steps,
        )
        for window, taken_steps in zip(weighed, num_steps, strict=True)
    )
    return windows, tuple(fault for fault in LoopFault if fault in faults)


def _clips_each(weighing: _Weighing, window: tuple[int, ...]) -> bool:
    def seen_at(scale: float) -> torch.Tensor:
        seen = weighing.run([window], scale)
        return seen.steps[-1] if seen.steps else seen.left

    plain, huge = seen_at(_TINY), seen_at(_HUGE)
    if torch.allclose(plain, huge, rtol=_CLOSE, atol=0):
        return False
    return weighing.clips_each(huge, plain)


def _faults_of(
    window: _Weighed, weights: Weights, configured_steps: int, configured_size: int
) -> tuple[LoopFault, ...]:
    """Name the mistakes that explain the weights of a window."""
    if abs(window.carried) > _NEGLIGIBLE:
        return (LoopFault.GRADIENTS_CARRIED_OVER,)
    if window.right:
        return ()
    if window.residual > _CLOSE:
        return (LoopFault.UNEXPLAINED,)
    largest = max(abs(weight) for weight in window.weights)
    if any(abs(weight) <= _NEGLIGIBLE * largest for weight in window.weights):
        return (LoopFault.SKIPPED_MICRO_BATCH,)
    known: tuple[LoopFault, ...] = ()
    if weights.weighting is not LossWeighting.SUM:
        known = _faults_of_a_mean(window, weights.weighting, configured_steps, configured_size)
    if known:
        return known
    return (LoopFault.SCALED if _common_factor(window) else LoopFault.UNEXPLAINED,)


def _faults_of_a_mean(
    window: _Weighed, weighting: LossWeighting, configured_steps: int, configured_size: int
) -> tuple[LoopFault, ...]:
    count, total = len(window.cut), sum(window.cut)
    configured_total = configured_steps * configured_size
    by_samples = weighting is LossWeighting.SAMPLES
    averaged = LoopFault.MEAN_OF_MEANS if by_samples else LoopFault.MEAN_OF_TARGET_MEANS
    # Giving different parts the same weight is wrong as well.
    alike = by_samples and len(set(window.cut)) == 1
    if count < configured_steps and window.follows((1 / configured_steps,) * count):
        return (LoopFault.DIVIDED_BY_CONFIGURED_STEPS, *(() if alike else (averaged,)))
    if total < configured_total and window.follows([n / configured_total for n in window.cut]):
        return (LoopFault.DIVIDED_BY_CONFIGURED_STEPS,)
    if window.follows((1 / count,) * count) or window.follows([n / total for n in window.cut]):
        return (averaged,)
    if window.follows((1.0,) * count):
        return (LoopFault.NOT_DIVIDED,)
    if count > 1 and not alike and window.follows(window.weights[:1] * count):
        return (LoopFault.DIVIDED_BY_WRONG_COUNT, averaged)
    return ()


def _common_factor(window: _Weighed) -> float | None:
    """Return the factor by which all weights are off, if it is the same for all."""
    factors = [a / b for a, b in zip(window.weights, window.expected, strict=True) if b]
    if factors and all(math.isclose(factor, factors[0], rel_tol=_CLOSE) for factor in factors):
        return factors[0]
    return None
