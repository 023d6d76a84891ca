"""What a traced convolution asks cuDNN, and the bound that holds where cuDNN cannot be asked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch

from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel
from memfit.simulation.tracing.convolutions import has_filters_by_channel, layout_of

__all__ = ["ConvolutionCall"]

_HALF: Final = (torch.float16, torch.bfloat16)
_NDIM_1D, _NDIM_2D, _NDIM_3D = 3, 4, 5
_DTYPES: Final = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclasses.dataclass(frozen=True, slots=True)
class ConvolutionCall:
    """One kernel of a convolution.

    Args:
        kernel: Which of the three.
        data: The input, or its gradient.
        weight: The weight, or its gradient.
        output: The output, or its gradient.
        parameters: Stride, padding, dilation, whether transposed, output padding, groups.
    """

    kernel: ConvolutionKernel
    data: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor
    parameters: tuple[Any, ...]

    @property
    def plan_key(self) -> tuple[Any, ...]:
        """The key under which torch keeps cuDNN's plan, besides the batch size."""
        shapes = tuple(self.data.shape[1:]), tuple(self.weight.shape)
        return (self.kernel, *shapes, repr(self.parameters))

    @property
    def is_grouped_by_channel(self) -> bool:
        """Whether each channel has filters of its own."""
        return has_filters_by_channel(self.data, self.parameters)

    @property
    def is_last(self) -> bool:
        """Whether the kernel runs in NHWC (NDHWC)."""
        if self.data.ndim == _NDIM_3D:
            return _lies_last(self.data) or _lies_last(self.weight)
        return layout_of(self.data, self.weight) is torch.channels_last

    def transposes(self, *, half: bool, tf32: bool) -> bool:
        """Whether tensor-core kernels copy its tensors into NHWC, where cuDNN cannot be asked.

        In half precision, every convolution of contiguous (NCHW) tensors transposes its input,
        weight and output. With TF32, the forward kernels read NCHW, and so do all kernels of 1x1
        convolutions, because those are matrix products. The backward kernels of larger filters
        compute in NHWC. Depthwise convolutions use PyTorch's own kernels.

        Args:
            half: Whether tensor cores compute in half precision.
            tf32: Whether they compute fp32 as TF32.

        Source: the kernel names that profilers show (`nchwToNhwcKernel`, `*_nhwc`,
            `xmma_fprop_*_nchw`), and docs.nvidia.com/deeplearning/performance/
            dl-performance-convolutional (tensor layouts).
        """
        if self.is_grouped_by_channel or self.data.ndim != _NDIM_2D:
            return False
        if self.is_last:
            return False
        if self.data.dtype in _HALF:
            return half
        return (
            self.data.dtype is torch.float32
            and tf32
            and self.kernel is not ConvolutionKernel.FORWARD
            and math.prod(self.weight.shape[2:]) > 1
        )

    def question(self) -> Convolution | None:
        """Return what to ask cuDNN; `None` if torch uses kernels of its own."""
        if self.data.dtype not in _DTYPES or self.data.ndim not in {_NDIM_1D, _NDIM_2D, _NDIM_3D}:
            return None
        stride, padding, dilation, is_transposed, *_ = self.parameters
        kernel, inputs, output = self.kernel, self.data.shape, self.output.shape
        if is_transposed:
            inputs, output = output, inputs
            kernel = _TRANSPOSED[kernel]
        num_dims = self.data.ndim - 2

        def spatial(numbers: Any) -> tuple[int, ...]:
            found = tuple(int(number) for number in numbers)
            return found * num_dims if len(found) == 1 else found

        geometry = [spatial(padding), spatial(stride), spatial(dilation)]
        shapes = [tuple(map(int, shape)) for shape in (inputs, self.weight.shape, output)]
        if num_dims == 1:
            # torch gives cuDNN an image of one row.
            shapes = [(*shape[:2], 1, shape[2]) for shape in shapes]
            geometry = [(extra, *values) for extra, values in zip((0, 1, 1), geometry, strict=True)]
        return Convolution(
            kernel=kernel,
            dtype=_DTYPES[self.data.dtype],
            is_channels_last=self.is_last,
            input_shape=shapes[0],
            weight_shape=shapes[1],
            output_shape=shapes[2],
            padding=geometry[0],
            stride=geometry[1],
            dilation=geometry[2],
        )


_TRANSPOSED: Final = {
    ConvolutionKernel.FORWARD: ConvolutionKernel.DATA,
    ConvolutionKernel.DATA: ConvolutionKernel.FORWARD,
    ConvolutionKernel.FILTER: ConvolutionKernel.FILTER,
}


def _lies_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()
