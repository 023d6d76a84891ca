"""What normalizations take from the allocator besides their outputs.

Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu, group_norm_kernel.cu, Normalization.cu and
    Normalization.cuh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch

from memfit.cards import Gpu
from memfit.simulation.needs import Need
from memfit.simulation.tracing.memory_formats import is_in_a_format, suggested_format
from memfit.simulation.tracing.reductions import scratch_of_rows
from memfit.simulation.tracing.scripts import (
    ALONE,
    OUTPUTS,
    Drop,
    Make,
    Release,
    Script,
    Workspace,
    contiguous_copy,
)

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "layer_norm",
    "layer_norm_backward",
]

_WARP: Final = 32
_MANY_ROWS: Final = 64 * 1024
_MOST_BLOCKS: Final = 64 * 1024 // 2
_ROWS_OF_A_BLOCK: Final = 32
_HALF: Final = (torch.float16, torch.bfloat16)
_KEEPS_MEANS_IN_FP32: Final = (2, 13)
# The release whose kernel takes an NHWC input, and copies it.
_COPIES_CHANNELS_LAST: Final = (2, 14)


def layer_norm(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """An input that is not contiguous is copied for the call, for RMSNorm too."""
    copy = contiguous_copy("contiguous input", args[0])
    return (*copy, OUTPUTS) if copy else ALONE


def layer_norm_backward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Gradient and input are copied if not contiguous, and many rows are summed in two passes.

    The last arguments are the parameters and what gradients are wanted. RMSNorm has no bias.
    """
    gradient, data, shape = args[:3]
    _, *wanted = args[-1]
    weight = args[-1 - len(wanted)]
    num_columns = math.prod(shape)
    num_rows = data.numel() // max(num_columns, 1)
    script: Script = (*contiguous_copy("contiguous input", data), OUTPUTS)
    script += contiguous_copy("contiguous gradient", gradient)
    if weight is not None:
        numbers = (num_rows, num_columns, weight.element_size())
        names = ("weight's parts", "bias's parts")[: len(wanted)]
        wanted_names = [name for name, is_wanted in zip(names, wanted, strict=True) if is_wanted]
        script += tuple(
            Workspace(name=name, need=Need(rule=_parts_bytes, numbers=numbers))
            for name in wanted_names
        )
        for name in wanted_names:
            taken: dict[str, Callable[..., int]] = {
                f"sum of {name}": _sum_bytes,
                f"partial sums of {name}": _partial_sum_bytes,
                f"semaphores of {name}": _sum_semaphore_bytes,
            }
            script += tuple(
                Workspace(name=each, need=Need(rule=rule, numbers=numbers))
                for each, rule in taken.items()
            )
            script += (Drop(tuple(reversed(taken))),)
    return script


def _num_parts(gpu: Gpu, num_rows: int, num_columns: int) -> int:
    """Return how many rows of partial gradients the kernel writes; 0 if it needs none."""
    if num_rows <= _MANY_ROWS or num_columns // _WARP >= gpu.multiprocessors // 2:
        return 0
    num_blocks_x = -(-num_columns // _WARP)
    return min(_MOST_BLOCKS // num_blocks_x, -(-num_rows // _ROWS_OF_A_BLOCK))


def _parts_bytes(gpu: Gpu, num_rows: int, num_columns: int, item_bytes: int) -> int:
    return _num_parts(gpu, num_rows, num_columns) * num_columns * item_bytes


def _sum_bytes(gpu: Gpu, num_rows: int, num_columns: int, item_bytes: int) -> int:
    """Return the bytes of the sum, which takes the place of the gradient."""
    return num_columns * item_bytes if _num_parts(gpu, num_rows, num_columns) else 0


def _partial_sum_bytes(gpu: Gpu, *numbers: int) -> int:
    return _scratch_of_sum(gpu, *numbers)[0]


def _sum_semaphore_bytes(gpu: Gpu, *numbers: int) -> int:
    return _scratch_of_sum(gpu, *numbers)[1]


def _scratch_of_sum(gpu: Gpu, num_rows: int, num_columns: int, item_bytes: int) -> tuple[int, int]:
    num_parts = _num_parts(gpu, num_rows, num_columns)
    return scratch_of_rows(gpu, num_parts, num_columns, item_bytes) if num_parts else (0, 0)


def group_norm(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Mean and deviation in fp32 for half inputs, and a scale and a shift for each channel.

    Before torch 2.13, mean and deviation were kept only as outputs (pytorch/pytorch#183946). Torch
    2.14 copies an NHWC input, as its requests in a rehearsed process show.
    """
    data, _, _, samples, channels, _, num_groups = args[:7]
    script: Script
    if kernels.torch_release == _COPIES_CHANNELS_LAST:
        script = (OUTPUTS, *contiguous_copy("contiguous input", data))
    else:
        copy = contiguous_copy("input in its own layout", data) if not is_in_a_format(data) else ()
        script = (*copy, OUTPUTS)
    if data.dtype in _HALF and kernels.torch_release >= _KEEPS_MEANS_IN_FP32:
        script += _each(("mean in fp32", "deviation in fp32"), 4 * samples * num_groups)
    return script + _each(("scale", "shift"), 4 * samples * channels)


def group_norm_backward(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Two sums for each channel, and factors for each group and channel.

    Source: `native_group_norm_backward` in aten/src/ATen/native/group_norm.cpp.
    """
    gradient, data = args[:2]
    samples, channels, num_groups = args[5], args[6], args[8]
    per_channel, per_group = 4 * samples * channels, 4 * samples * num_groups
    copies = kernels.torch_release == _COPIES_CHANNELS_LAST
    script: Script = (
        *(
            contiguous_copy("contiguous input", data)
            if copies
            else contiguous_copy("gradient in the input's format", gradient, suggested_format(data))
        ),
        OUTPUTS,
        *_each(("sums of the gradient", "sums of the gradient x input"), per_channel),
        *_each(("factors of a group", "shifts of a group"), per_group),
    )
    is_last = data.ndim == 4 and not data.is_contiguous()  # noqa: PLR2004
    if copies or not is_last:
        script += (Workspace(name="factors of a channel", num_bytes=per_channel),)
    return (*script, Drop.of("shifts of a group", "factors of a group"))


def batch_norm(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Without training there is nothing to save. PyTorch's own kernels stage NHWC's sums."""
    data, weight, training = args[0], args[1], args[5]
    if not training:
        return ALONE if data.dtype is torch.bfloat16 else (Make((0,)),)
    if not _runs_in_cudnn(data, weight) and _is_channels_last(data):
        return (OUTPUTS, *_staging(data, 4))
    return ALONE


def batch_norm_backward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Copy a gradient that cuDNN reads in the input's format. PyTorch's own kernels reduce first.

    Source: `cudnn_batch_norm_backward` in aten/src/ATen/native/cudnn/BatchNorm.cpp, and
        `batch_norm_backward_cuda` in aten/src/ATen/native/cuda/Normalization.cu.
    """
    gradient, data, weight = args[:3]
    training = args[7]
    if training and _runs_in_cudnn(data, weight):
        copy = contiguous_copy("gradient in the input's format", gradient, suggested_format(data))
        return (*copy, OUTPUTS)
    flat = _flattened(gradient)
    if not _is_channels_last(data):
        return (*flat, OUTPUTS)
    sums = _each(("sum of gradients", "sum of gradients x input"), 4 * data.shape[1])
    if not _is_channels_last(gradient):
        return (*flat, *sums, Make((1, 2)), Drop.all_of(flat), OUTPUTS)
    staging = _staging(data, 2)
    return (*sums, Make((1, 2)), *staging, Drop.of("semaphores", "staging"), OUTPUTS)


def _runs_in_cudnn(data: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether cuDNN computes a batch norm in training; it has no bf16.

    Source: `_batch_norm_impl_index` in aten/src/ATen/native/Normalization.cpp.
    """
    return (
        weight is not None
        and data.ndim >= 3  # noqa: PLR2004
        and torch.bfloat16 not in {data.dtype, weight.dtype}
        and (data.dtype is not torch.float16 or weight.dtype is torch.float32)
    )


def _flattened(gradient: torch.Tensor) -> tuple[Workspace, ...]:
    """Return the copy of images whose pixels are not in one row, as `Tensor.reshape` makes it."""
    if gradient.ndim == 4 and min(gradient.shape[2:]) > 1:  # noqa: PLR2004
        row, pixel = gradient.stride()[2:]
        if row != pixel * gradient.shape[3]:
            return (Workspace.copy_of(gradient, "gradient with pixels in a row"),)
    return ()


def _is_channels_last(data: torch.Tensor) -> bool:
    """Whether PyTorch's own kernels read a tensor as rows of channels.

    Source: `batch_norm_use_channels_last_kernels` in aten/src/ATen/native/cuda/Normalization.cuh.
    """
    if data.is_contiguous():
        return data.ndim > 1 and data.stride(1) == 1
    return data.ndim == 4 and data.is_contiguous(memory_format=torch.channels_last)  # noqa: PLR2004


def _staging(data: torch.Tensor, num_values: int) -> Script:
    """Return what a reduction over many blocks of an NHWC tensor takes."""
    channels = data.shape[1]
    rows = data.numel() // max(channels, 1)
    numbers = (rows, channels, num_values)
    return (
        Workspace(name="staging", need=Need(rule=_staging_bytes, numbers=numbers)),
        Workspace(name="semaphores", need=Need(rule=_semaphore_bytes, numbers=numbers)),
    )


def _staging_bytes(_gpu: Gpu, rows: int, channels: int, num_values: int) -> int:
    _, grid_y = _grid(rows, channels)
    return 4 * num_values * channels * grid_y if grid_y > 1 else 0


def _semaphore_bytes(_gpu: Gpu, rows: int, channels: int, _num_values: int) -> int:
    grid_x, grid_y = _grid(rows, channels)
    return 4 * grid_x if grid_y > 1 else 0


def _grid(rows: int, channels: int) -> tuple[int, int]:
    """Return the grid of blocks; `flexible_launch_configs` in Normalization.cuh."""
    width = min(_power_of_two(channels), 32)
    height = min(_power_of_two(-(-rows // 16)), 512 // width)
    if width * height != 512:  # noqa: PLR2004
        width = min(_power_of_two(channels), 512 // height)
    grid_y = min(-(-rows // (height * 16)), 128)
    return -(-channels // width), grid_y if grid_y >= 8 else 1  # noqa: PLR2004


def _power_of_two(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def _each(names: tuple[str, ...], num_bytes: int) -> tuple[Workspace, ...]:
    return tuple(Workspace(name=name, num_bytes=num_bytes) for name in names)
