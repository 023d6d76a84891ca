"""Computes gradients again in ways in which only rounding differs.

`memfit.equivalence.comparison` decides what the differences allow.
"""

from __future__ import annotations

import torch

from memfit.equivalence.comparison import roundoff_of
from memfit.equivalence.gradients import CheckSetup, Gradients, gradients
from memfit.equivalence.weighting import Weights
from memfit.errors import WorkloadError

__all__ = ["reordered", "rounded_otherwise"]

_NUM_ROUNDED = 4


def reordered(setup: CheckSetup, cut: tuple[int, ...], weights: Weights) -> Gradients | None:
    """Return the gradients of a batch with its samples in another order.

    Args:
        setup: The step to run.
        cut: How its batch is cut.
        weights: What the loss averages over.

    Returns:
        The gradients; `None` if the batch cannot be reordered.
    """
    size = setup.num_samples
    # No sample keeps its place, its neighbours, or its partner in a pair.
    even, odd = range(0, size, 2), range(1, size, 2)
    order = [2, 1, 0] if size == 3 else [*reversed(even), *reversed(odd)]  # noqa: PLR2004
    if size == 2:  # noqa: PLR2004 - a pair has one other order
        order = [1, 0]
    return _in_order(setup, cut, weights, torch.tensor(order))


def _in_order(
    setup: CheckSetup, cut: tuple[int, ...], weights: Weights, order: torch.Tensor
) -> Gradients | None:
    try:
        turned = setup.reordered(order)
    except WorkloadError:
        return None  # the user's own function cuts this batch, so it cannot be reordered
    return gradients(turned, cut, weights=weights.of(cut, turned.samples), order=order)


def rounded_otherwise(setup: CheckSetup, cut: tuple[int, ...], weights: Weights) -> list[Gradients]:
    """Return the reference's gradients with every weight changed by one rounding at most.

    Whatever a kernel rounds, the values that come out of a layer change by about as much. Sums over
    the samples are rounded otherwise in another order. One such change may happen to leave a
    gradient's scale as it is, so there are several.

    Args:
        setup: The step to run. Its parameters are put back.
        cut: How its batch is cut.
        weights: What the loss averages over.
    """
    roundoff = roundoff_of(setup)
    generator = torch.Generator().manual_seed(2)
    kept = [(one, one.detach().to("cpu", copy=True)) for one in setup.parameters().values()]
    found = []

    def run() -> Gradients:
        return gradients(setup, cut, weights=weights.of(cut, setup.samples))

    try:
        for _ in range(_NUM_ROUNDED):
            with torch.no_grad():
                for parameter, value in kept:
                    change = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(value * (1 + roundoff * (2 * change - 1)))
            order = torch.randperm(setup.num_samples, generator=generator)
            found.append(_in_order(setup, cut, weights, order) or run())
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
    return found
