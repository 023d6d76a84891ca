"""Weights for the losses of micro-batches, so that they add up to the whole batch's loss.

A loss may average over samples, valid targets or other things. These are first counted in the whole
effective batch. The weight of a micro-batch is its share of that count. The module `ranks` adds up
counts over several ranks.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, cast

import torch

from memfit.cards import is_rehearsed
from memfit.errors import UsageError, WorkloadError
from memfit.step.runner import check_losses

__all__ = ["LossTerms", "Weight", "Weights", "check_weight", "counts_of", "shares_of"]

Weight = Union[Literal["samples", "sum"], Callable[[Any], Any]]  # noqa: UP007 - an alias, at runtime
"""What a loss averages over: samples, nothing (a sum), or what a function of a batch counts."""

Weights = Union[Weight, Sequence[Weight], Mapping[str, Weight]]  # noqa: UP007 - as above
"""One weight for all losses, or one for each, nested as the losses are."""


def check_weight(weight: object) -> None:
    """Refuse a value that is not a weight.

    Raises:
        UsageError: The value is neither a known word nor a function.
    """
    if not callable(weight) and weight not in ("samples", "sum"):
        raise UsageError(
            "weight must be 'samples', 'sum' or a function that counts what the "
            f"loss of a batch averages over, not {weight!r}."
        )


def counts_of(weight: Weight, micro_batches: Sequence[Any], sizes: Sequence[int]) -> list[float]:
    """Count what a loss averages over, in each micro-batch.

    Args:
        weight: What the loss averages over.
        micro_batches: The micro-batches.
        sizes: Samples in each of them.

    Returns:
        A count for each micro-batch. For a sum each count is 1.

    Raises:
        WorkloadError: A count is not a number, or is negative.
    """
    if weight == "samples":
        return [float(size) for size in sizes]
    if weight == "sum":
        return [1.0] * len(sizes)
    assert callable(weight)
    counted = [weight(micro_batch) for micro_batch in micro_batches]
    if all(isinstance(count, torch.Tensor) and count.numel() == 1 for count in counted):
        # Read all at once, because every single read makes the host wait for the device.
        counts = [float(count) for count in torch.stack([c.reshape(()) for c in counted]).tolist()]
    else:
        counts = [_number(count) for count in counted]
    for count in counts:
        if not (math.isfinite(count) and count >= 0):
            raise WorkloadError(
                f"The weight of a micro-batch must be a count, at least 0, not {count}."
            )
    return counts


def _number(count: object) -> float:
    if isinstance(count, torch.Tensor):
        if count.numel() != 1:
            raise WorkloadError(
                f"The weight of a micro-batch must be one number, not a tensor of shape "
                f"{tuple(count.shape)}: end the function with .sum()."
            )
        return float(count)
    if not isinstance(count, numbers.Real):
        raise WorkloadError(
            f"The weight of a micro-batch must be one number, not {type(count).__name__}."
        )
    return float(count)


def shares_of(weight: Weight, counts: Sequence[float], total: float) -> list[float]:
    """Return each micro-batch's share of the count of the effective batch.

    Args:
        weight: What the loss averages over.
        counts: The result of `counts_of`.
        total: The sum of all counts over the whole effective batch, on all ranks.

    Returns:
        Factors for the losses of the micro-batches.

    Raises:
        WorkloadError: The total count is zero.
    """
    if weight == "sum":
        return [1.0] * len(counts)
    if total == 0 and is_rehearsed():
        # Counts read from a rehearsed device are 0, because its kernels compute nothing.
        return [1 / len(counts)] * len(counts)
    if total == 0:
        raise WorkloadError(
            "The weight of the whole batch is 0, so its loss has nothing to average over."
        )
    return [count / total for count in counts]


class LossTerms:
    """The losses that are added up, and what each of them averages over.

    Args:
        weight: One weight for all losses, or one for each, nested as the losses are.

    Raises:
        UsageError: A weight is neither a known word nor a function.
    """

    def __init__(self, weight: Weights) -> None:
        self._keys: tuple[str, ...] | None = None
        self._is_single = not isinstance(weight, (Mapping, tuple, list))
        if isinstance(weight, Mapping):
            self._keys = tuple(weight)
            self.weights: tuple[Weight, ...] = tuple(weight.values())
        elif isinstance(weight, (tuple, list)):
            self.weights = tuple(weight)
        else:
            self.weights = (cast("Weight", weight),)
        for each in self.weights:
            check_weight(each)

    def counts(self, micro_batches: list[Any], sizes: tuple[int, ...]) -> list[list[float]]:
        """Count what each loss averages over, in each micro-batch.

        Args:
            micro_batches: The micro-batches.
            sizes: Samples in each of them.

        Raises:
            WorkloadError: A count is not a number, or is negative.
        """
        return [counts_of(weight, micro_batches, sizes) for weight in self.weights]

    def shares(
        self,
        counts: Sequence[Sequence[float]],
        totals: Sequence[float],
        *,
        factor: float = 1,
    ) -> list[tuple[float, ...]]:
        """Return for each micro-batch the factors of its losses.

        Args:
            counts: The result of the method `counts`.
            totals: The sums of the counts over the effective batch, one for each weight.
            factor: All factors are also multiplied by this.

        Raises:
            WorkloadError: A total count is zero.
        """
        by_loss = [
            [share * factor for share in shares_of(weight, counted, total)]
            for weight, counted, total in zip(self.weights, counts, totals, strict=True)
        ]
        return list(zip(*by_loss, strict=True))

    def losses(self, returned: Any) -> list[torch.Tensor]:
        """Check the losses that the loss function returned; return them as a list.

        Raises:
            WorkloadError: A loss is not one number, or the losses are not nested as the weights.
        """
        if isinstance(returned, Mapping):
            if self._keys is not None and set(returned) != set(self._keys):
                raise WorkloadError(
                    f"The losses are {', '.join(map(repr, returned))}, but the weights are "
                    f"for {', '.join(map(repr, self._keys))}."
                )
            losses = [returned[key] for key in self._keys or returned]
        elif isinstance(returned, (tuple, list)):
            losses = list(returned)
        else:
            losses = [returned]
        if not losses or not (self._is_single or len(losses) == len(self.weights)):
            raise WorkloadError(
                f"The loss function returned {len(losses)} losses, and there are "
                f"{len(self.weights)} weights."
            )
        check_losses(losses)
        return [loss.reshape(()) for loss in losses]

    def meant(self, losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the losses that are weighted as means over samples."""
        weights = self.weights * len(losses) if self._is_single else self.weights
        return [one for one, each in zip(losses, weights, strict=True) if each == "samples"]

    def for_each(self, losses: Sequence[torch.Tensor], weights: Sequence[float]) -> Sequence[float]:
        """Return one weight for each loss, also where one weight is given for all losses."""
        return [weights[0]] * len(losses) if self._is_single else weights
