"""What a loss averages over, found by cutting its batch.

The gradient of the whole batch's loss, in the rows of one micro-batch's outputs, is a multiple of
the gradient of that micro-batch's own loss, if the loss does not mix samples. The multiple is the
weight that the micro-batch has to have. Where no multiple fits, the loss mixes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memfit._torch_private import pytree
from memfit.equivalence.splits import spans
from memfit.records import LossWeighting, MixesIn, MixingLayer
from memfit.step import batches

__all__ = ["Weights", "can_be_cut", "num_valid_targets", "of_loss", "weights_by", "with_ignored"]

_IGNORED_TARGET = -100
"""Source: torch.nn.functional.cross_entropy, `ignore_index`."""

_MOVED = 1e-7
"""Room for a loss that computes in float32, as many do for stability."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a loss averages over.

    Args:
        weighting: The rule that the measured weights follow.
        mixer: The loss, if it mixes samples.
        measure: From the cut of a batch and its targets to the weights, for a loss that follows no
            known rule.
        labels_in_inputs: The model computes the loss itself, from labels among its inputs.
    """

    weighting: LossWeighting
    mixer: MixingLayer | None = None
    measure: Callable[[Sequence[int], tuple[Any, ...]], tuple[float, ...]] | None = None
    labels_in_inputs: bool = False

    def of(self, cut: Sequence[int], inputs: Any, targets: tuple[Any, ...]) -> tuple[float, ...]:
        """Return what the loss of each micro-batch has to be multiplied by.

        Args:
            cut: Samples in each micro-batch.
            inputs: The whole batch's.
            targets: The whole batch's, one by one.
        """
        if self.labels_in_inputs:
            targets = with_ignored((inputs, targets))
        if self.measure is not None:
            return self.measure(cut, targets)
        return weights_by(self.weighting, cut, targets)


def weights_by(
    weighting: LossWeighting, cut: Sequence[int], targets: tuple[Any, ...]
) -> tuple[float, ...]:
    """Return the weights that a rule gives to the micro-batches of a cut."""
    if weighting is LossWeighting.SUM:
        return (1.0,) * len(cut)
    counts = [float(size) for size in cut]
    if weighting is LossWeighting.TARGETS:
        counts = [
            float(sum(num_valid_targets(batches.take(target, *span)) for target in targets))
            for span in spans(cut)
        ]
    total = sum(counts)
    return tuple(count / total for count in counts)


def num_valid_targets(targets: Any) -> int:
    """Return how many integer targets are not to be ignored."""
    return sum(
        int((leaf != _IGNORED_TARGET).sum())
        for leaf in pytree.tree_leaves(targets)
        if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point()
    )


def with_ignored(values: Any) -> tuple[Any, ...]:
    """Return the integer tensors in which some targets are to be ignored."""
    return tuple(
        leaf
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, torch.Tensor)
        and not leaf.is_floating_point()
        and bool((leaf == _IGNORED_TARGET).any())
    )


def can_be_cut(outputs: Any, num_samples: int) -> bool:
    """Whether all of a model's outputs have samples; not so if it computes the loss itself."""
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return bool(tensors) and all(leaf.ndim > 0 and leaf.shape[0] == num_samples for leaf in tensors)


def of_loss(
    loss: Callable[..., torch.Tensor], outputs: Any, targets: tuple[Any, ...], cut: Sequence[int]
) -> Weights:
    """Find out what a loss averages over, and whether it mixes samples.

    Args:
        loss: From outputs and targets to one number.
        outputs: The model's, for at least one sample, in float64.
        targets: The whole batch's, one by one.
        cut: Samples in each micro-batch, not all the same.

    Returns:
        The rule, and the loss where it mixes.
    """
    weights, unexplained = _measured(loss, batches.resized(outputs, sum(cut)), targets, cut)
    if unexplained > _MOVED:
        return Weights(
            weighting=LossWeighting.SAMPLES,
            mixer=MixingLayer(
                name="loss",
                type_name=getattr(loss, "__name__", type(loss).__name__),
                mixes_in=MixesIn.LOSS,
                moved=unexplained,
            ),
        )
    for rule in (LossWeighting.SAMPLES, LossWeighting.SUM, LossWeighting.TARGETS):
        if rule is LossWeighting.TARGETS and not num_valid_targets(targets):
            continue
        expected = weights_by(rule, cut, targets)
        if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(weights, expected, strict=True)):
            return Weights(weighting=rule)

    def measure(other_cut: Sequence[int], other_targets: tuple[Any, ...]) -> tuple[float, ...]:
        enough = batches.resized(outputs, sum(other_cut))
        host = pytree.tree_map(
            lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, other_targets
        )
        return _measured(loss, enough, host, other_cut)[0]

    return Weights(weighting=LossWeighting.MEASURED, measure=measure)


def _measured(
    loss: Callable[..., torch.Tensor], outputs: Any, targets: tuple[Any, ...], cut: Sequence[int]
) -> tuple[tuple[float, ...], float]:
    """Return the weight of each micro-batch, and the share that no weight explains."""
    whole = _gradient(loss, outputs, targets)
    weights, unexplained = [], 0.0
    for start, stop in spans(cut):
        rows = torch.cat([leaf[start:stop].flatten() for leaf in whole])
        parts = _gradient(
            loss,
            batches.take(outputs, start, stop),
            tuple(batches.take(target, start, stop) for target in targets),
        )
        own = torch.cat([leaf.flatten() for leaf in parts])
        square = float(torch.dot(own, own))
        weight = float(torch.dot(rows, own)) / square if square else 0.0
        norm = float(torch.linalg.vector_norm(rows))
        if norm:
            apart = float(torch.linalg.vector_norm(rows - weight * own))
            unexplained = max(unexplained, apart / norm)
        weights.append(weight)
    return tuple(weights), unexplained


def _gradient(
    loss: Callable[..., torch.Tensor], outputs: Any, targets: tuple[Any, ...]
) -> list[torch.Tensor]:
    """Return the loss's gradient in each floating-point output."""
    leaves, spec = pytree.tree_flatten(outputs)
    fresh = [
        leaf.detach().clone().requires_grad_() if _is_numbers(leaf) else leaf for leaf in leaves
    ]
    wanted = [leaf for leaf in fresh if _is_numbers(leaf)]
    with torch.enable_grad():
        value = loss(pytree.tree_unflatten(fresh, spec), *targets)
        found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            value, wanted, allow_unused=True
        )
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(wanted, found, strict=True)
    ]


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
