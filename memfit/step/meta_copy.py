"""A user's objects without the values of their tensors, for a step that only counts bytes.

Every parameter, buffer and tensor attribute becomes one of the same shape, type and layout on the
meta device; weights are neither copied nor touched. What a model keeps outside its modules'
attributes is copied as `copy.deepcopy` does.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["without_values"]

_T = TypeVar("_T")
_META = torch.device("meta")


def without_values(parts: _T, *, modules: tuple[nn.Module, ...], optimizer: Any = None) -> _T:
    """Copy objects with their tensors replaced by ones without values.

    Args:
        parts: What to copy, in any nesting; tensors that it shares stay shared.
        modules: The modules in it.
        optimizer: The optimizer in it, if there is one.

    Returns:
        The copy, on the meta device.
    """
    memo: dict[int, Any] = {}
    for module in modules:
        for child in module.modules():
            attributes = (v for v in vars(child).values() if isinstance(v, torch.Tensor))
            own = (*child.parameters(recurse=False), *child.buffers(recurse=False))
            for tensor in (*own, *attributes):
                if id(tensor) not in memo:
                    memo[id(tensor)] = _empty(tensor)
    if isinstance(optimizer, Optimizer):
        for state in optimizer.state.values():
            for value in state.values():
                # Step counters stay on the CPU, as they do beside a real device.
                if isinstance(value, torch.Tensor) and value.ndim:
                    memo[id(value)] = _empty(value)
    return copy.deepcopy(parts, memo)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=_META)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)
