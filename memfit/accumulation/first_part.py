"""Checks of the first micro-batch: its loss is no sum, and its gradients are left in `.grad`.

A loss that is a sum where a mean is expected is recognised before it trains anything.

Micro-batches of a sum are added as they are. Weighted as a mean, they give a gradient that is too
small. What a loss function does is read from the graph of its result: torch's losses keep their
reduction there. A graph that does not tell says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from memfit.errors import WorkloadError
from memfit.step.nesting import leaves_of

__all__ = ["check_left", "check_means"]

_MEAN, _SUM = 1, 2
"""Source: torch's Reduction (aten/src/ATen/core/Reduction.h)."""

# What may lie between outputs and their sum and does not divide by the number of samples. A product
# or quotient may do that.
_FOR_EACH_SAMPLE = frozenset(
    {
        "Abs",
        "Add",
        "ClampMin",
        "CtcLoss",
        "Exp",
        "Gather",
        "Log",
        "LogSoftmax",
        "MaskedFill",
        "Neg",
        "Norm",
        "Pow",
        "Relu",
        "Select",
        "Softplus",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "ToCopy",
        "Unsqueeze",
        "View",
        "Where",
    }
)


def check_means(
    losses: Sequence[torch.Tensor], outputs: Any, *, weight: str = "the weight 'samples'"
) -> None:
    """Refuse losses that are certain to be sums.

    Args:
        losses: The losses of a micro-batch, each to be weighted as a mean over samples.
        outputs: What the model returned.
        weight: The weight, in words.

    Raises:
        WorkloadError: One of them is a sum.
    """
    edges = {
        leaf.grad_fn
        for leaf in leaves_of(outputs)
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.grad_fn is not None
    }
    if any(loss.grad_fn is not None and _is_sum(loss.grad_fn, edges) for loss in losses):
        raise WorkloadError(
            f"The loss is a sum, and {weight} is for a loss that is a mean over "
            "samples, so gradients would be too small: give weight='sum', or a loss with "
            "reduction='mean'. If the loss is a mean after all, give weight=function, a function "
            "that counts the samples of a batch."
        )


def check_left(parameters: Iterable[torch.Tensor]) -> None:
    """Refuse a step that leaves no gradient after a backward pass.

    Args:
        parameters: The parameters of the model and the optimizer.

    Raises:
        WorkloadError: None of them has a gradient.
    """
    if all(parameter.grad is None for parameter in parameters):
        raise WorkloadError(
            "The backward pass left no gradient in .grad. A hook drops it, as an optimizer that "
            "steps in backward does. Then there is nothing to accumulate: remove the hook."
        )


def _is_sum(node: Any, edges: Collection[Any]) -> bool:
    """Whether a loss is a sum over samples, for certain."""
    reduction = _reduction(node)
    if reduction is not None:
        return reduction == _SUM
    name = _name(node)
    # Smoothing multiplies by a number in C++, and a user's own number is multiplied otherwise.
    is_smoothing = str(node.name()) == "MulBackward1"
    if (name in ("Add", "Neg", "View") or is_smoothing) and node not in edges:
        inner = _inner(node)
        return bool(inner) and all(_is_sum(one, edges) for one in inner)
    # The sum of what a model returned may be a sum of what is a mean already.
    return name == "Sum" and all(
        one not in edges and _is_for_each(one, edges) for one in _inner(node)
    )


def _is_for_each(node: Any, edges: Collection[Any]) -> bool:
    """Whether a summand belongs to one sample and is not divided by their number."""
    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if _reduction(one) == _MEAN or _name(one) == "AccumulateGrad":
            return False
        if one in edges or _reduction(one) is not None:
            continue
        if _name(one) not in _FOR_EACH_SAMPLE:
            return False
        waiting += _inner(one)
    return True


def _reduction(node: Any) -> int | None:
    """Return how one of torch's losses reduces; `None` if the node is none, or has weights."""
    reduction = getattr(node, "_saved_reduction", None)
    is_binary = _name(node).startswith("BinaryCrossEntropy")
    # Given weights may divide by the number of samples. Weights of classes do not.
    if is_binary and getattr(node, "_saved_weight", None) is not None:
        return _MEAN
    return reduction if isinstance(reduction, int) else None


def _name(node: Any) -> str:
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _inner(node: Any) -> list[Any]:
    return [one for one, _ in node.next_functions if one is not None]
