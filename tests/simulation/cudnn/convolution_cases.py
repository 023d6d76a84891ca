"""Convolutions whose workspaces are compared. As a script: writes what torch's own code takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from memfit.simulation.cudnn.questions import ConvolutionKernel
from memfit.simulation.tracing.convolution_calls import ConvolutionCall

# Samples, channels, image, filters, filter, stride, groups, whether transposed.
SHAPES = (
    (64, 64, 56, 64, 3, 1, 1, False),
    (33, 3, 112, 64, 7, 2, 1, False),
    (16, 256, 14, 512, 1, 2, 1, False),
    (16, 64, 28, 64, 3, 1, 4, False),
    (9, 32, 14, 16, 4, 2, 1, True),
    # Products of matrices, and two whose filters' gradients are none.
    (16, 256, 28, 64, 1, 1, 1, False),
    (8, 24, 28, 96, 1, 1, 1, False),
    (4, 320, 7, 640, 1, 1, 1, False),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASKS = {
    ConvolutionKernel.DATA: (True, False, False),
    ConvolutionKernel.FILTER: (False, True, False),
}


def cases() -> list[tuple[tuple[Any, ...], torch.dtype, bool]]:
    return [(shape, dtype, last) for shape in SHAPES for dtype in DTYPES for last in (False, True)]


def tensors(
    shape: tuple[Any, ...], dtype: torch.dtype, is_last: bool, device: str
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    samples, channels, image, filters, size, stride, groups, is_transposed = shape
    layout = torch.channels_last if is_last else torch.contiguous_format
    sizes = (
        (channels, filters, size, size)
        if is_transposed
        else (filters, channels // groups, size, size)
    )
    data = torch.empty(samples, channels, image, image, device=device, dtype=dtype)
    weight = torch.empty(sizes, device=device, dtype=dtype)
    padding = size // 2 if size % 2 else 1
    parameters = [[stride] * 2, [padding] * 2, [1, 1], is_transposed, [0, 0], groups]
    return data.to(memory_format=layout), weight.to(memory_format=layout), parameters


def calls(shape: tuple[Any, ...], dtype: torch.dtype, is_last: bool) -> list[ConvolutionCall]:
    data, weight, parameters = tensors(shape, dtype, is_last, "meta")
    output = torch.ops.aten.convolution(data, weight, None, *parameters)
    return [
        ConvolutionCall(kernel, data, weight, output, tuple(parameters))
        for kernel in ConvolutionKernel
    ]


def _taken(run: Any) -> int:
    """Return what a call takes beyond what it leaves."""
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    stats = torch.cuda.memory_stats()
    del kept
    taken: int = stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]
    return taken


def real() -> list[list[int]]:
    found = []
    for shape, dtype, is_last in cases():
        data, weight, parameters = tensors(shape, dtype, is_last, "cuda")
        convolution = torch.ops.aten.convolution
        output = convolution(data, weight, None, *parameters)
        taken = [_taken(lambda: convolution(data, weight, None, *parameters))]  # noqa: B023
        for mask in MASKS.values():
            backward = torch.ops.aten.convolution_backward
            arguments = (output, data, weight, None, *parameters, mask)
            taken.append(_taken(lambda: backward(*arguments)))  # noqa: B023
        found.append(taken)
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(real()))
