"""What kernels take from the allocator besides the tensors that an operation returns.

Every term is named and says where it comes from; none is fitted to a model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

__all__ = ["Kernels", "Workspace"]

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Memory that a kernel takes for the length of its call.

    Args:
        name: What it is for.
        num_bytes: How much.
        is_needed: The kernel cannot do without; otherwise another is taken where it has no room.
    """

    name: str
    num_bytes: int
    is_needed: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The kernels of a card and its libraries."""

    transposes_convolutions: bool = True

    def before(self, func: Any, args: tuple[Any, ...]) -> tuple[Workspace, ...]:
        return ()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _aten.convolution_backward.default:
            return _convolution_backward(*args)
        return func(*args, **kwargs)

    def during(self, func: Any, args: tuple[Any, ...], result: Any) -> tuple[Workspace, ...]:
        if func is _aten.convolution.default:
            return self._convolution((args[0], args[1], result), groups=args[8])
        if func is _aten.convolution_backward.default:
            gi = self._convolution((args[0], args[2], result[0]), groups=args[9])
            gw = self._convolution((args[0], args[1], result[1]), groups=args[9])
            return gi + gw
        return ()

    def _convolution(self, tensors: Any, *, groups: int) -> tuple[Workspace, ...]:
        if not self.transposes_convolutions or any(t is None for t in tensors):
            return ()
        x, w, _ = tensors
        if groups > 1:
            return ()
        if x.dtype is torch.float32 or x.ndim != 4:
            return ()
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return ()
        return (Workspace(name="nhwc", num_bytes=sum(t.numel() * t.element_size() for t in tensors), is_needed=False),)


def _convolution_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: Any,
    output_padding: Any,
    groups: int,
    output_mask: Any,
) -> tuple[torch.Tensor | None, ...]:
    is_last = grad_output.ndim == 4 and (
        (grad_output.is_contiguous(memory_format=torch.channels_last) and not grad_output.is_contiguous())
        or (weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())
        or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
    )
    fmt = torch.channels_last if is_last else torch.contiguous_format
    gi = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=fmt) if output_mask[0] else None
    gw = torch.empty_like(weight) if output_mask[1] else None
    gb = weight.new_empty(bias_sizes) if output_mask[2] else None
    return gi, gw, gb
