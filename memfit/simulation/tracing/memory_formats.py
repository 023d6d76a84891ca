"""The layout that torch reads from a tensor's strides.

A tensor whose other dimensions have one element is contiguous in both formats. Then only its
strides tell the format.
"""

from __future__ import annotations

import torch

__all__ = ["has_strides_of_nhwc", "is_dense", "is_in_a_format", "suggested_format"]


def has_strides_of_nhwc(tensor: torch.Tensor) -> bool:
    """Whether the strides have the order of channels-last images, with gaps or without.

    Source: `is_channels_last_strides_2d` in c10/core/MemoryFormat.h.
    """
    if tensor.ndim != 4 or not tensor.stride(1):  # noqa: PLR2004 - images
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        # Where neither tells, as in (N, 1, 1, 1), the order is NCHW.
        if stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def suggested_format(tensor: torch.Tensor) -> torch.memory_format:
    """Return the format that torch takes from a tensor of up to four dimensions.

    Source: `suggest_memory_format` in aten/src/ATen/core/TensorBase.h.
    """
    return torch.channels_last if has_strides_of_nhwc(tensor) else torch.contiguous_format


def is_in_a_format(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous in NCHW or in NHWC."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in any order of the dimensions.

    Source: `compute_non_overlapping_and_dense` in c10/core/SymbolicShapeMeta.cpp.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
