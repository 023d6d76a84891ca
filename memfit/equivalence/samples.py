"""Samples that tell something: all different, and weights that let every gradient through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memfit._torch_private import convert_tensors, pytree

__all__ = ["made_distinct", "moved_off_zero", "widen"]

_JITTER = 0.5
_NEAR_ZERO = 1e-3
_SPREAD = 0.02  # as timm and most of its kin initialise weights


def made_distinct(batch: Any, split: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, int]:
    """Make samples that are copies of others different from them.

    An example batch that is smaller than the effective one is repeated to fill it, and in a batch
    of copies nothing that mixes samples shows.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        split: From a batch to its inputs, which alone are changed, and its targets.

    Returns:
        The same nesting, and how many samples were changed: numbers have noise added, integers are
        put in another order within the sample.
    """
    inputs = {id(leaf) for leaf in pytree.tree_leaves(split(batch)[0])}
    leaves, spec = pytree.tree_flatten(batch)
    tensors = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and id(leaf) in inputs
    ]
    seen: set[tuple[float, ...]] = set()
    copies = []
    for sample in range(len(tensors[0])):
        signature = tuple(_signature(leaf[sample]) for leaf in tensors)
        if signature in seen:
            copies.append(sample)
        seen.add(signature)
    if not copies:
        return batch, 0
    generator = torch.Generator().manual_seed(0)
    changed = [
        _jittered(leaf, copies, generator) if any(leaf is tensor for tensor in tensors) else leaf
        for leaf in leaves
    ]
    return pytree.tree_unflatten(changed, spec), len(copies)


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


def widen(module: nn.Module) -> None:
    """Convert parameters and buffers to double precision in place, complex ones as well."""
    wider = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return tensor.to(wider.get(tensor.dtype, tensor.dtype))
        return tensor.double() if tensor.is_floating_point() else tensor

    convert_tensors(module, convert)
