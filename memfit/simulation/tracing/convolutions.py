"""What a convolution makes, copies and sums besides the workspaces of its kernels.

A depthwise convolution of contiguous tensors runs in PyTorch's own kernels, and all others run in
cuDNN. cuDNN computes in one layout, so what has another is copied for the call. The gradient of the
bias is a sum over the gradient of the output.

Source: aten/src/ATen/native/Convolution.cpp, aten/src/ATen/native/cudnn/ConvShared.cpp and
    aten/src/ATen/native/cuda/DepthwiseConv2d.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from memfit.simulation.cudnn.questions import ConvolutionKernel
from memfit.simulation.tracing.memory_formats import has_strides_of_nhwc, suggested_format
from memfit.simulation.tracing.reductions import input_vector, reduction_scratch
from memfit.simulation.tracing.scripts import (
    OUTPUTS,
    Drop,
    Make,
    Script,
    Workspace,
    contiguous_copy,
)

__all__ = [
    "backward_outputs",
    "backward_script",
    "forward_script",
    "has_filters_by_channel",
    "is_depthwise",
    "layout_of",
]

_NAME_OF_COPY: Final = "{} in the convolution's layout"


def has_filters_by_channel(data: torch.Tensor, parameters: Sequence[Any]) -> bool:
    """Whether each channel has filters of its own, whatever kernel runs.

    Args:
        data: The input.
        parameters: Stride, padding, dilation, whether transposed, output padding, groups.
    """
    *_, is_transposed, _, groups = parameters
    return groups > 1 and groups == data.shape[1] and not is_transposed


def is_depthwise(data: torch.Tensor, weight: torch.Tensor, parameters: Sequence[Any]) -> bool:
    """Whether PyTorch's own depthwise kernels run, which read contiguous tensors only.

    Args:
        data: The input.
        weight: The weight.
        parameters: Stride, padding, dilation, whether transposed, output padding, groups.
    """
    return (
        has_filters_by_channel(data, parameters)
        and not _prefers_cudnn(data, weight, parameters)
        and weight.shape[0] % data.shape[1] == 0
        and data.ndim == 4  # noqa: PLR2004 - (N, C, H, W)
        and not _computes_in_nhwc(data, weight)
    )


def _prefers_cudnn(data: torch.Tensor, weight: torch.Tensor, parameters: Sequence[Any]) -> bool:
    """Whether torch gives a depthwise convolution of contiguous tensors to cuDNN.

    Source: `use_cudnn_depthwise` and `check_cudnn_depthwise_workload_with_filter` in
        aten/src/ATen/native/Convolution.cpp.
    """
    stride, _, dilation, *_ = parameters
    if data.ndim != 4 or data.dtype is not torch.float16:  # noqa: PLR2004 - (N, C, H, W)
        return False
    samples, channels, _, width = data.shape
    height_of_filter, filter_size = weight.shape[2:]
    is_plain = max(dilation) == 1 and len(set(stride)) == 1 and channels >= 32  # noqa: PLR2004
    if not is_plain or height_of_filter != filter_size or filter_size not in {1, 3, 5}:
        return False
    return _depthwise_pays(samples, channels, width, filter_size, int(stride[0]))


def _depthwise_pays(samples: int, channels: int, width: int, filter_size: int, stride: int) -> bool:
    """Whether torch holds cuDNN for the faster one; the numbers are torch's own."""
    if width < 7 or stride > 2:  # noqa: PLR2004
        return False
    if stride == 1:
        return True
    if samples == 1:
        return filter_size > 1 or width <= 28  # noqa: PLR2004
    if filter_size == 1:
        return samples <= 16 and channels >= 128 and width <= 7  # noqa: PLR2004
    return channels >= 512 or (channels >= 256 and width >= 28)  # noqa: PLR2004


def forward_script(
    args: tuple[Any, ...], result: torch.Tensor, workspace: Callable[..., Workspace]
) -> Script:
    """Return what a convolution takes.

    Args:
        args: The arguments of `aten::convolution`.
        result: Its output.
        workspace: Returns the workspace of a kernel; see `Kernels`.
    """
    data, weight = args[:2]
    layout = layout_of(data, weight)
    if is_depthwise(data, weight, args[3:9]):
        return (*_copied("input", data, layout), OUTPUTS)
    return (
        *_copied("input", data, layout),
        OUTPUTS,
        *_copied("weight", weight, layout),
        workspace(ConvolutionKernel.FORWARD, (data, weight, result), args[3:9]),
    )


def backward_script(
    args: tuple[Any, ...], result: tuple[Any, ...], workspace: Callable[..., Workspace]
) -> Script:
    """Return what the gradients of a convolution take.

    Args:
        args: The arguments of `aten::convolution_backward`.
        result: Its outputs.
        workspace: Returns the workspace of a kernel; see `Kernels`.
    """
    gradient, data, weight = args[:3]
    if is_depthwise(data, weight, args[4:10]):
        script = _depthwise_backward(args, result)
    else:
        script = _cudnn_backward(args, result, workspace)
    if result[2] is not None:
        dims = (0, *range(2, gradient.ndim))
        vector = input_vector(gradient.element_size())
        script += (Make((2,)), *reduction_scratch(gradient, dims, input_vector=vector))
    return script


def _depthwise_backward(args: tuple[Any, ...], result: tuple[Any, ...]) -> Script:
    """Source: `conv_depthwise2d_backward_cuda_out` in DepthwiseConv2d.cu."""
    gradient, data, weight = args[:3]
    layout = layout_of(data, weight)
    of_gradient = _copied("gradient", gradient, layout)
    script: Script = of_gradient
    if result[1] is not None:
        of_data = _copied("input", data, layout)
        script += (*of_data, Make((1,)), Drop.all_of(of_data))
    if result[0] is not None:
        script += (Make((0,)),)
    return (*script, Drop.all_of(of_gradient))


def _cudnn_backward(
    args: tuple[Any, ...], result: tuple[Any, ...], workspace: Callable[..., Workspace]
) -> Script:
    """Source: `cudnn_convolution_backward` in ConvShared.cpp."""
    gradient, data, weight = args[:3]
    layout = layout_of(data, weight)
    copies = () if result[1] is None else _copied("input", data, layout)
    read_in = layout if copies else suggested_format(data)
    each: tuple[Workspace, ...] = ()
    if _has_order_of(gradient, read_in, is_transposed=args[7]):
        # A part of a larger tensor is copied by each kernel.
        each = _copied("gradient", gradient, layout)
    else:
        copies += (Workspace.copy_of(gradient, "gradient in the input's format"),)
        # The filter can be in another format than an input that is not copied.
        each = _copied("gradient", torch.empty_like(gradient, memory_format=read_in), layout)
    script: Script = copies
    if result[0] is not None:
        of_weight = _copied("weight", weight, layout)
        taken = workspace(ConvolutionKernel.DATA, (data, weight, gradient), args[4:10])
        script += (Make((0,)), *of_weight, *each, taken, Drop.all_of((*of_weight, *each, taken)))
    if result[1] is not None:
        taken = workspace(ConvolutionKernel.FILTER, (data, weight, gradient), args[4:10])
        script += (*each, Make((1,)), taken, Drop.all_of((*each, taken)))
    return (*script, Drop.all_of(copies))


def backward_outputs(
    data: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, needed: Any
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of a convolution in cuDNN's layout.

    The meta device would look at the gradient's layout, too.
    """
    memory_format = layout_of(data, weight)
    return (
        torch.empty_like(data, memory_format=memory_format) if needed[0] else None,
        torch.empty_like(weight, memory_format=memory_format) if needed[1] else None,
        weight.new_empty(bias_sizes) if needed[2] else None,
    )


def _has_order_of(
    gradient: torch.Tensor, read_in: torch.memory_format, *, is_transposed: bool
) -> bool:
    """Whether a gradient stays as it is when torch brings it into the format of the input.

    Source: `cudnn_convolution_backward`, which asks `Tensor.to` for it, and
        `cudnn_convolution_transpose_backward`, which asks `Tensor.contiguous`, in
        aten/src/ATen/native/cudnn/ConvShared.cpp.
    """
    if is_transposed:
        return gradient.is_contiguous(memory_format=read_in)
    return suggested_format(gradient) is read_in


def _computes_in_nhwc(data: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether cuDNN computes in NHWC: if either of the two has its order.

    Source: `cudnn_conv_suggest_memory_format` in aten/src/ATen/native/ConvUtils.h.
    """
    return has_strides_of_nhwc(data) or has_strides_of_nhwc(weight)


def layout_of(data: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Return the layout in which a convolution computes."""
    return torch.channels_last if _computes_in_nhwc(data, weight) else torch.contiguous_format


def _copied(name: str, tensor: torch.Tensor, layout: torch.memory_format) -> tuple[Workspace, ...]:
    """Return the copy of a tensor whose layout is not the convolution's."""
    return contiguous_copy(_NAME_OF_COPY.format(name), tensor, layout)
