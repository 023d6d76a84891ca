"""What interpolation copies: its kernels read, and some write, one layout only.

A kernel for NHWC runs where there are enough channels. The others take contiguous images, so what
is not contiguous is copied: the input, and the output too if it is to be in NHWC.

Source: `upsample_*_out_cuda_template` in aten/src/ATen/native/cuda/UpSample*.cu. The numbers of
channels are torch's own. All of it was seen, rehearsed, in the requests of torch 2.8, 2.9 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from memfit.simulation.tracing.memory_formats import suggested_format
from memfit.simulation.tracing.scripts import ALONE, OUTPUTS, Script, contiguous_copy

__all__ = ["INTERPOLATIONS"]

_LAST: Final = torch.channels_last
_FEWEST_CHANNELS: Final = 4
_FEWEST_CHANNELS_OF_BILINEAR: Final = 16


def _contiguous(_kernels: object, args: tuple[Any, ...], result: torch.Tensor) -> Script:
    return (OUTPUTS, *_output(result), *_input(args[0]))


def _input_first(_kernels: object, args: tuple[Any, ...], result: torch.Tensor) -> Script:
    return (OUTPUTS, *_input(args[0]), *_output(result))


def _in_either_layout(kernels: object, args: tuple[Any, ...], result: torch.Tensor) -> Script:
    data = args[0]
    if data.shape == result.shape:
        return ALONE
    if suggested_format(data) is _LAST and data.shape[1] >= _FEWEST_CHANNELS:
        return (OUTPUTS, *_input(data, _LAST))
    return _contiguous(kernels, args, result)


def _bilinear(_kernels: object, args: tuple[Any, ...], result: torch.Tensor) -> Script:
    """Contiguous images are read where they are, with any strides."""
    data = args[0]
    is_wide = data.shape[1] >= _FEWEST_CHANNELS_OF_BILINEAR
    if data.shape != result.shape and suggested_format(data) is _LAST and is_wide:
        return (OUTPUTS, *_input(data, _LAST))
    return ALONE


def _input(data: torch.Tensor, layout: torch.memory_format = torch.contiguous_format) -> Script:
    return contiguous_copy("input in the kernel's layout", data, layout)


def _output(result: torch.Tensor) -> Script:
    return contiguous_copy("output in the kernel's layout", result)


INTERPOLATIONS: Final[dict[str, Callable[[Any, tuple[Any, ...], Any], Script]]] = {
    "upsample_nearest1d.default": _contiguous,
    "upsample_nearest1d_backward.default": _contiguous,
    "_upsample_nearest_exact1d.default": _contiguous,
    "_upsample_nearest_exact1d_backward.default": _contiguous,
    "upsample_linear1d_backward.default": _contiguous,
    "upsample_nearest2d.default": _in_either_layout,
    "upsample_nearest2d_backward.default": _in_either_layout,
    "_upsample_nearest_exact2d.default": _in_either_layout,
    "_upsample_nearest_exact2d_backward.default": _in_either_layout,
    "upsample_bilinear2d.default": _bilinear,
    "upsample_bilinear2d_backward.default": _in_either_layout,
    "upsample_bicubic2d_backward.default": _contiguous,
    "_upsample_bilinear2d_aa.default": _contiguous,
    "_upsample_bicubic2d_aa.default": _contiguous,
    "_upsample_bicubic2d_aa_backward.default": _contiguous,
    "upsample_nearest3d.default": _contiguous,
    "upsample_nearest3d_backward.default": _contiguous,
    "_upsample_nearest_exact3d.default": _contiguous,
    "_upsample_nearest_exact3d_backward.default": _contiguous,
    "upsample_trilinear3d_backward.default": _input_first,
}
"""The script of each operation, by its name. One more copies its input as other operations do."""
