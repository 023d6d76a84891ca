"""Samples that tell something: all different, and weights that let every gradient through."""

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
_SPREAD = 0.02  # as timm and most of its kin initialise weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A batch that is cut, each part a copy of its own: a step may change its batch in place.

    Args:
        batch: The whole of it.
        layout: How it is cut.
        split: From a batch to the model's inputs, and the loss's targets one by one.
    """

    batch: Any
    layout: Layout
    split: Callable[[Any], tuple[Any, tuple[Any, ...]]]

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return self.layout.num_samples

    def part(self, start: int, stop: int) -> Any:
        """Return the samples from `start` up to and without `stop`, as new tensors."""
        return batches.private_copy(self.layout.take(self.batch, start, stop))

    def of(self, start: int, stop: int) -> tuple[Any, tuple[Any, ...]]:
        """Return the inputs and targets of some samples, as new tensors."""
        return self.split(self.part(start, stop))

    def first(self, num_samples: int) -> Samples:
        """Return the first samples alone."""
        return self._with(self.layout.take(self.batch, 0, num_samples), num_samples)

    def picked(self, rows: Sequence[int]) -> Samples:
        """Return some of the samples, in an order of choice, each any number of times.

        Raises:
            WorkloadError: A function of the user's cuts the batch.
        """
        return self._with(self.layout.reordered(self.batch, list(rows)), len(rows))

    def changed(self, change: Callable[[Any], Any]) -> Samples:
        """Return the samples as a function makes them of the batch."""
        return dataclasses.replace(self, batch=change(self.batch))

    def _with(self, batch: Any, num_samples: int) -> Samples:
        roles = self.layout.roles
        if roles is not None:
            roles = dataclasses.replace(roles, num_samples=num_samples)
        layout = dataclasses.replace(self.layout, num_samples=num_samples, roles=roles)
        return dataclasses.replace(self, batch=batch, layout=layout)


def was_written_to(values: Any) -> bool:
    """Whether any of some tensors, that were new, has been changed in place."""
    return any(
        isinstance(leaf, torch.Tensor) and not leaf.is_inference() and version_of(leaf) > 0
        for leaf in leaves_of(values)
    )


def made_distinct(samples: Samples) -> tuple[Samples, int]:
    """Make samples that are copies of others different from them.

    An example batch that is smaller than the effective one is repeated to fill it, and in a batch
    of copies nothing that mixes samples shows.

    Args:
        samples: The batch; its inputs alone are changed.

    Returns:
        The same, and how many samples were changed: numbers have noise added, integers are put in
        another order within the sample.
    """
    samples = samples.changed(batches.private_copy)
    generator = torch.Generator().manual_seed(0)
    seen: set[tuple[float, ...]] = set()
    first: set[int] = set()
    num_copies = 0
    for sample in range(samples.num_samples):
        # Views of the batch; what all samples share is where the first one has it.
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
    """Give parameters at or near zero the spread of initial weights, and return how many.

    A last layer, a residual branch's gain or a layer scale that begins at zero lets no gradient
    through to what is before it, and gradients that are zero are equal without proving anything.

    Args:
        model: Changed in place.

    Returns:
        How many parameters were moved.
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
