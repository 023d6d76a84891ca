"""Prepares samples that all differ, and weights that let every gradient through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from memfit._torch_private import version_of
from memfit.step import batches
from memfit.step.batches import Layout
from memfit.step.nesting import leaves_of

__all__ = ["Samples", "made_distinct", "moved_off_zero", "was_written_to"]

_JITTER = 0.5
_NEAR_ZERO = 1e-3
_SPREAD = 0.02  # the usual spread of initial weights, in timm and elsewhere


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A batch to cut. Each part is a new copy, because a step may change its batch in place.

    Args:
        batch: The whole batch.
        layout: How it is cut.
        split: A function of a batch; it returns the model's inputs, and the loss's targets one by
            one.
    """

    batch: Any
    layout: Layout
    split: Callable[[Any], tuple[Any, tuple[Any, ...]]]

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return self.layout.num_samples

    def part(self, start: int, stop: int) -> Any:
        """Return the samples from `start` up to but not including `stop`, as new tensors."""
        return batches.private_copy(self.layout.take(self.batch, start, stop))

    def of(self, start: int, stop: int) -> tuple[Any, tuple[Any, ...]]:
        """Return the inputs and targets of some samples, as new tensors."""
        return self.split(self.part(start, stop))

    def first(self, num_samples: int) -> Samples:
        """Return the first samples alone."""
        return self._with(self.layout.take(self.batch, 0, num_samples), num_samples)

    def picked(self, rows: Sequence[int]) -> Samples:
        """Return some of the samples in any order; a sample may be taken several times.

        Raises:
            WorkloadError: The user's own function cuts the batch.
        """
        return self._with(self.layout.reordered(self.batch, list(rows)), len(rows))

    def changed(self, change: Callable[[Any], Any]) -> Samples:
        """Return the samples of the batch after a function changed it."""
        return dataclasses.replace(self, batch=change(self.batch))

    def _with(self, batch: Any, num_samples: int) -> Samples:
        roles = self.layout.roles
        if roles is not None:
            roles = dataclasses.replace(roles, num_samples=num_samples)
        layout = dataclasses.replace(self.layout, num_samples=num_samples, roles=roles)
        return dataclasses.replace(self, batch=batch, layout=layout)


def was_written_to(values: Any) -> bool:
    """Whether any of some tensors was changed in place since it was created."""
    return any(
        isinstance(leaf, torch.Tensor) and not leaf.is_inference() and version_of(leaf) > 0
        for leaf in leaves_of(values)
    )


def made_distinct(samples: Samples) -> tuple[Samples, int]:
    """Change samples that are copies of others, so that all samples differ.

    An example batch that is smaller than the effective batch is repeated to fill it. In a batch of
    copies, mixing samples changes nothing, so it would not be found.

    Args:
        samples: The batch. Only its inputs are changed.

    Returns:
        The changed batch, and the number of changed samples. Floating-point values get noise;
        integers are put in another order within the sample.
    """
    samples = samples.changed(batches.private_copy)
    generator = torch.Generator().manual_seed(0)
    seen: set[tuple[float, ...]] = set()
    first: set[int] = set()
    num_copies = 0
    for sample in range(samples.num_samples):
        # These are views of the batch; a part that all samples share is the same memory.
        inputs = samples.split(samples.layout.take(samples.batch, sample, sample + 1))[0]
        leaves = [leaf for leaf in leaves_of(inputs) if _can_be_changed(leaf)]
        own = [leaf for leaf in leaves if leaf.data_ptr() not in first]
        if sample == 0:
            first = {leaf.data_ptr() for leaf in leaves}
            own = leaves
        signature = tuple(map(_signature, leaves))
        if signature in seen and own:
            num_copies += 1
            for leaf in own:
                leaf.copy_(_jittered(leaf, generator))
        seen.add(signature)
    return samples, num_copies


def _can_be_changed(leaf: Any) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.ndim > 0
        and leaf.layout is torch.strided
        and not leaf.is_nested
    )


def _signature(sample: torch.Tensor) -> float:
    flat = sample.detach().flatten()
    wide = (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).double()
    return float(wide @ torch.linspace(1, 2, wide.numel(), dtype=torch.float64, device=wide.device))


def _jittered(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if leaf.is_floating_point():
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        spread = float(leaf.double().std()) if leaf.numel() > 1 else float(leaf.abs().sum())
        return leaf + _JITTER * (spread or 1.0) * noise
    if leaf.is_complex() or leaf.dtype is torch.bool:
        return leaf
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    return leaf.flatten()[order].view(leaf.shape)


def moved_off_zero(model: nn.Module) -> int:
    """Give parameters at or near zero the spread of initial weights; return their number.

    Some models begin with zeros in the last layer, in the gain of a residual branch or in a layer
    scale. Then no gradient reaches the layers before. Gradients that are zero are always equal, so
    comparing them proves nothing.

    Args:
        model: The model, changed in place.

    Returns:
        The number of changed parameters.
    """
    generator = torch.Generator().manual_seed(0)
    num_moved = 0
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.requires_grad:
            continue
        data = parameter.detach()
        if float(torch.linalg.vector_norm(data.double())) <= _NEAR_ZERO * data.numel() ** 0.5:
            noise = _SPREAD * torch.randn(data.shape, generator=generator)
            data.add_(noise.to(data.device, data.dtype))
            num_moved += 1
    return num_moved
