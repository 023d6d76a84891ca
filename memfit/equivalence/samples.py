"""Samples that tell something: all different, and weights that let every gradient through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from memfit._torch_private import pytree, version_of
from memfit.step import batches

__all__ = ["Samples", "made_distinct", "moved_off_zero", "was_written_to"]

_JITTER = 0.5
_NEAR_ZERO = 1e-3
_SPREAD = 0.02  # as timm and most of its kin initialise weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A batch that is cut, each part a copy of its own: a step may change its batch in place.

    Args:
        batch: The whole of it.
        num_samples: Samples in it.
        split: From a batch to the model's inputs, and the loss's targets one by one.
    """

    batch: Any
    num_samples: int
    split: Callable[[Any], tuple[Any, tuple[Any, ...]]]

    def part(self, start: int, stop: int) -> Any:
        """Return the samples from `start` up to and without `stop`, as new tensors."""
        return _copied(batches.take(self.batch, start, stop))

    def of(self, start: int, stop: int) -> tuple[Any, tuple[Any, ...]]:
        """Return the inputs and targets of some samples, as new tensors."""
        return self.split(self.part(start, stop))

    def first(self, num_samples: int) -> Samples:
        """Return the first samples alone."""
        return dataclasses.replace(
            self,
            batch=batches.take(self.batch, 0, num_samples),
            num_samples=min(num_samples, self.num_samples),
        )

    def picked(self, rows: Sequence[int]) -> Samples:
        """Return some of the samples, in an order of choice, each any number of times."""
        return dataclasses.replace(
            self,
            batch=batches.reordered(self.batch, torch.tensor(rows)),
            num_samples=len(rows),
        )

    def changed(self, change: Callable[[Any], Any]) -> Samples:
        """Return the samples as a function makes them of the batch."""
        return dataclasses.replace(self, batch=change(self.batch))


def _copied(batch: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch
    )


def was_written_to(values: Any) -> bool:
    """Whether any of some tensors, that were new, has been changed in place."""
    return any(
        isinstance(leaf, torch.Tensor) and not leaf.is_inference() and version_of(leaf) > 0
        for leaf in pytree.tree_leaves(values)
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
    inputs = {id(leaf) for leaf in pytree.tree_leaves(samples.split(samples.batch)[0])}
    leaves, spec = pytree.tree_flatten(samples.batch)
    tensors = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor)
        and leaf.ndim > 0
        and len(leaf) == samples.num_samples
        and id(leaf) in inputs
    ]
    if not tensors:
        return samples, 0
    seen: set[tuple[float, ...]] = set()
    copies = []
    for sample in range(samples.num_samples):
        signature = tuple(_signature(leaf[sample]) for leaf in tensors)
        if signature in seen:
            copies.append(sample)
        seen.add(signature)
    if not copies:
        return samples, 0
    generator = torch.Generator().manual_seed(0)
    changed = [
        _jittered(leaf, copies, generator) if any(leaf is tensor for tensor in tensors) else leaf
        for leaf in leaves
    ]
    return samples.changed(lambda _batch: pytree.tree_unflatten(changed, spec)), len(copies)


def _signature(sample: torch.Tensor) -> float:
    flat = sample.detach().flatten()
    wide = (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).double()
    return float(wide @ torch.linspace(1, 2, wide.numel(), dtype=torch.float64, device=wide.device))


def _jittered(leaf: torch.Tensor, samples: list[int], generator: torch.Generator) -> torch.Tensor:
    changed = leaf.clone()
    for sample in samples:
        row = leaf[sample]
        if leaf.is_floating_point():
            noise = torch.randn(row.shape, generator=generator).to(leaf.device, leaf.dtype)
            spread = float(row.double().std()) if row.numel() > 1 else float(row.abs().sum())
            changed[sample] = row + _JITTER * (spread or 1.0) * noise
        elif not leaf.is_complex() and leaf.dtype is not torch.bool:
            order = torch.randperm(row.numel(), generator=generator).to(leaf.device)
            changed[sample] = row.flatten()[order].view(row.shape)
    return changed


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
