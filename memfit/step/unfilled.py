"""Builds models without random weights, for a device that does not compute with them.

Drawing the weights of a large model takes seconds on a CPU, and so does copying them. A rehearsed
card computes nothing, so its weights can be anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["UnfilledWeights"]

# The operations of torch.nn.init and timm's initialisation: draws, and arithmetic on draws.
_FILLS = frozenset(
    (
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
        torch.Tensor.erfinv_,
        torch.nn.init.trunc_normal_,
        torch.nn.init.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.kaiming_normal_,
    )
)
_ARITHMETIC = frozenset((torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.clamp_))
# A meta tensor has no values, and PyTorch's own functions would check the arguments in Python.
_CONSTANTS = frozenset((torch.Tensor.fill_, torch.Tensor.zero_))
_LARGE = 2**14  # elements; smaller ones cost nothing, and may be more than weights


class UnfilledWeights(TorchFunctionMode):
    """In the block, large floating-point tensors are not filled, and not copied to a device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return a tensor unchanged instead of filling it, and a new one instead of a copy."""
        keywords = kwargs or {}
        if func in _FILLS or func in _ARITHMETIC:
            filled = args[0] if args else keywords["tensor"]
            if filled.is_meta or (filled.is_floating_point() and filled.numel() >= _LARGE):
                return filled
        elif func in _CONSTANTS and args and args[0].is_meta:
            return args[0]
        elif func is torch.Tensor.to and _is_moved_weight(*args, **keywords):
            return torch.empty_like(args[0], device=args[1], dtype=args[2] if args[2:] else None)
        return func(*args, **keywords)


def _is_moved_weight(
    weight: torch.Tensor, device: Any = None, dtype: Any = None, *_: Any, **named: Any
) -> bool:
    """Whether `Module.to` moves a large weight from the CPU to a device, and keeps its layout.

    The copy would have to read and write all of it. The allocation is the same without: torch
    converts to another type before it copies.
    """
    return (
        isinstance(weight, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.is_floating_point()
        and weight.is_contiguous()
        and weight.numel() >= _LARGE
        and isinstance(device, torch.device)
        and device.type != "cpu"
        and (dtype is None or isinstance(dtype, torch.dtype))
        and not named
    )
