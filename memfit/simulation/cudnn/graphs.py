"""Describes a convolution to cuDNN, as a graph of one operation."""

from __future__ import annotations

import ctypes
from typing import Final

from memfit.simulation.cudnn.backend_api import (
    BACKWARD_DATA,
    BACKWARD_FILTER,
    FORWARD,
    Descriptors,
    Role,
)
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel

__all__ = ["graph_of"]

# cudnnDataType_t
_DTYPES: Final = {"float32": 0, "float16": 2, "bfloat16": 9}
_ROLES: Final[dict[ConvolutionKernel, Role]] = {
    ConvolutionKernel.FORWARD: FORWARD,
    ConvolutionKernel.DATA: BACKWARD_DATA,
    ConvolutionKernel.FILTER: BACKWARD_FILTER,
}


def graph_of(cudnn: Descriptors, convolution: Convolution) -> ctypes.c_void_p:
    """Return the graph of a convolution.

    Raises:
        CudnnError: cuDNN refuses it.
    """
    dtype = _DTYPES[convolution.dtype]
    shapes = (convolution.input_shape, convolution.weight_shape, convolution.output_shape)
    tensors = [
        cudnn.tensor(number, dtype, shape, _strides(shape, is_last=convolution.is_channels_last))
        for number, shape in enumerate(shapes, start=1)
    ]
    return cudnn.graph(
        _ROLES[convolution.kernel],
        tensors,
        padding=convolution.padding,
        stride=convolution.stride,
        dilation=convolution.dilation,
    )


def _strides(shape: tuple[int, ...], *, is_last: bool) -> list[int]:
    """Return strides in elements, the channels innermost or the last dimension innermost."""
    order = [0, *range(2, len(shape)), 1] if is_last else list(range(len(shape)))
    strides = [0] * len(shape)
    step = 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= shape[dimension]
    return strides
