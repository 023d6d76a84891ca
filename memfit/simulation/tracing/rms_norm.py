"""RMSNorm as CUDA runs it: one kernel, where the meta device runs one operation after another.

Source: `rms_norm` in aten/src/ATen/native/layer_norm.cpp, and `_fused_rms_norm_cuda` and its
    backward in aten/src/ATen/native/cuda/layer_norm_kernel.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from memfit._torch_private import aten, below_autograd
from memfit.errors import NotSimulatedError
from memfit.simulation.tracing.memory_formats import has_strides_of_nhwc
from memfit.simulation.tracing.releases import torch_release

__all__ = ["rms_norm", "rms_norm_backward_outputs", "rms_norm_outputs"]

_FUSED_SINCE: Final = (2, 9)


def rms_norm(
    input: torch.Tensor,  # noqa: A002 - the name in torch
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Normalize as torch does on CUDA, with one kernel where it has one.

    Args:
        input: Shape (..., *normalized_shape).
        normalized_shape: The sizes of the last dimensions.
        weight: Shape `normalized_shape`.
        eps: As for torch.

    Returns:
        The output, of the shape of the input.
    """
    if torch_release() < _FUSED_SINCE or not _is_fused(input, tuple(normalized_shape), weight):
        return functional.rms_norm(input, normalized_shape, weight, eps)
    output: torch.Tensor = _Fused.apply(input, tuple(normalized_shape), weight, eps)
    return output


def _is_fused(data: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor | None) -> bool:
    """Whether there is a kernel; torch also says what is wrong with shapes that do not fit."""
    return (
        tuple(data.shape[data.ndim - len(shape) :]) == shape
        and (weight is None or (weight.dtype is data.dtype and tuple(weight.shape) == shape))
        and data.is_floating_point()
        and not has_strides_of_nhwc(data)
    )


class _Fused(torch.autograd.Function):
    """One kernel forward, and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        data: torch.Tensor,
        shape: tuple[int, ...],
        weight: torch.Tensor | None,
        eps: float | None,
    ) -> torch.Tensor:
        with below_autograd():
            output, deviation = aten("_fused_rms_norm.default")(data, shape, weight, eps)
        ctx.save_for_backward(data, weight, deviation)
        ctx.shape = shape
        result: torch.Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotSimulatedError.because(
                "A second derivative of RMSNorm", "torch computes it with other operations"
            )
        data, weight, deviation = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        with below_autograd():
            of_data, of_weight = aten("_fused_rms_norm_backward.default")(
                gradient, data, ctx.shape, deviation, weight, wanted
            )
        return of_data, None, of_weight, None


def rms_norm_outputs(
    data: torch.Tensor, shape: Sequence[int], *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the reciprocal deviation, which is in fp32 for half precision too."""
    rows = (*data.shape[: data.ndim - len(shape)], *(1,) * len(shape))
    dtype = data.dtype if data.dtype is torch.float64 else torch.float32
    return data.new_empty(data.shape), data.new_empty(rows, dtype=dtype)


def rms_norm_backward_outputs(
    _gradient: torch.Tensor,
    data: torch.Tensor,
    _shape: Sequence[int],
    _deviation: torch.Tensor,
    weight: torch.Tensor | None,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of the input and of the weight."""
    return (
        data.new_empty(data.shape) if wanted[0] else None,
        torch.empty_like(weight) if wanted[1] and weight is not None else None,
    )
