"""Makes the outputs of the most frequent operations on meta tensors quickly.

PyTorch's own meta functions are written in Python. Their checks and type promotion take most of a
trace's time. This module handles only the plain cases: operands of one type, and layouts that allow
only one result. In these cases the outputs are the same as PyTorch's, which a test checks. All
other cases are left to PyTorch, and so are operands of sizes that do not fit together: PyTorch says
what is wrong with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from memfit._torch_private import aten_if_there
from memfit.simulation.tracing.by_operation import once_per_operation
from memfit.simulation.tracing.remembered import Remembered
from memfit.simulation.tracing.rms_norm import rms_norm_backward_outputs, rms_norm_outputs

__all__ = ["outputs"]

_REMEMBERED: Final = Remembered()


def outputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on meta tensors, or on a step's few CPU tensors (an optimizer's counters).

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its other arguments.

    Returns:
        The outputs, with the same shapes, types and strides as PyTorch's.
    """
    if _writes_lists(func) and args[0][0].is_meta:
        return None
    return _REMEMBERED.run(_run, func, args, kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    quick = None if kwargs else _quick_of(func)
    result = None if quick is None else quick(*args)
    return func(*args, **kwargs) if result is None else result


@once_per_operation
def _quick_of(func: Any) -> Callable[..., Any] | None:
    return _quick().get(func)


@functools.cache
def _quick() -> dict[Any, Callable[..., Any]]:
    """Return the quick functions by operation, without operations that this torch lacks."""
    found = {aten_if_there(name): quick for name, quick in _QUICK.items()}
    found.pop(None, None)
    return found


@once_per_operation
def _writes_lists(func: Any) -> bool:
    """Whether it writes to lists of tensors, as `_foreach_add_` does, and returns nothing."""
    name: str = func.__name__.partition(".")[0]
    return name.startswith(("_foreach_", "_fused_")) and name.endswith("_")


def _elementwise(first: Any, *rest: Any) -> torch.Tensor | None:
    """Handle tensors of one type that have one shape and layout, or that are broadcast."""
    if not (type(first) is torch.Tensor and first.is_floating_point()):
        return None
    for other in rest:
        if not isinstance(other, torch.Tensor):
            continue
        if other.dtype is not first.dtype:
            return None
        if other.shape != first.shape or other.stride() != first.stride():
            return _broadcast(first, *rest)
    return torch.empty_like(first) if _is_dense(first) else None


def _broadcast(first: torch.Tensor, *rest: Any) -> torch.Tensor | None:
    """Handle contiguous tensors of one type whose shapes broadcast to the first one's shape."""
    for other in rest:
        if isinstance(other, torch.Tensor) and not (
            other.is_contiguous()
            and other.ndim == first.ndim
            and all(o in (1, f) for o, f in zip(other.shape, first.shape, strict=True))
        ):
            return None
    return torch.empty_like(first) if first.is_contiguous() else None


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _unary(data: torch.Tensor, *_: Any) -> torch.Tensor | None:
    return torch.empty_like(data) if data.is_floating_point() and _is_dense(data) else None


def _softmax_backward(
    gradient: torch.Tensor, output: torch.Tensor, _dim: int, dtype: torch.dtype
) -> torch.Tensor | None:
    if not (gradient.is_contiguous() and output.is_contiguous()):
        return None
    return torch.empty_like(gradient, dtype=dtype)


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    if not _alike(left, right) or left.shape[1] != right.shape[0]:
        return None
    return left.new_empty((left.shape[0], right.shape[1]))


def _addmm(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    if not _alike(bias, left) or bias.shape[-1] not in (1, right.shape[1]):
        return None
    return _mm(left, right)


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    if not _alike(left, right) or left.shape[::2] != right.shape[:2]:
        return None
    return left.new_empty((left.shape[0], left.shape[1], right.shape[2]))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype


def _reduction(data: torch.Tensor, dims: Any, keepdim: bool = False) -> torch.Tensor | None:
    if not (data.is_contiguous() and data.is_floating_point() and dims and data.ndim):
        return None
    gone = {dim % data.ndim for dim in dims}
    if keepdim:
        shape = [1 if i in gone else size for i, size in enumerate(data.shape)]
    else:
        shape = [size for i, size in enumerate(data.shape) if i not in gone]
    return data.new_empty(shape)


def _roll(data: torch.Tensor, *_: Any) -> torch.Tensor | None:
    return torch.empty_like(data) if data.is_contiguous() else None


def _layer_norm(
    data: torch.Tensor, shape: Any, weight: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, ...] | None:
    if not data.is_contiguous() or (weight is not None and weight.dtype is not data.dtype):
        return None
    if tuple(data.shape[data.ndim - len(shape) :]) != tuple(shape):
        return None
    rows = (*data.shape[: data.ndim - len(shape)], *(1,) * len(shape))
    return (torch.empty_like(data), *(data.new_empty(rows, dtype=torch.float32) for _ in range(2)))


def _layer_norm_backward(
    _gradient: torch.Tensor, data: torch.Tensor, _shape: Any, _mean: Any, _rstd: Any, *rest: Any
) -> tuple[torch.Tensor | None, ...] | None:
    if not data.is_contiguous():
        return None
    *parameters, needed = rest
    tensors = (data, *parameters)
    return tuple(
        torch.empty_like(tensor) if wanted and tensor is not None else None
        for tensor, wanted in zip(tensors, needed, strict=True)
    )


def _batch_norm(
    data: torch.Tensor, _weight: Any, _bias: Any, _mean: Any, _var: Any, training: bool, *_: Any
) -> tuple[torch.Tensor, ...] | None:
    if not training:
        return None
    channels = data.shape[1]
    saved = (data.new_empty(channels, dtype=torch.float32) for _ in range(2))
    return (torch.empty_like(data), *saved)


def _batch_norm_backward(
    _gradient: torch.Tensor, data: torch.Tensor, weight: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor | None, ...]:
    needed = rest[-1]
    channels = data.shape[1]
    return (
        torch.empty_like(data) if needed[0] else None,
        data.new_empty(channels, dtype=torch.float32) if needed[1] and weight is not None else None,
        data.new_empty(channels, dtype=torch.float32) if needed[2] else None,
    )


def _each(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    if not all(t.is_floating_point() and _is_dense(t) for t in tensors):
        return None
    return [torch.empty_like(tensor) for tensor in tensors]


_QUICK: Final[dict[str, Callable[..., Any]]] = {
    "add.Tensor": _elementwise,
    "sub.Tensor": _elementwise,
    "mul.Tensor": _elementwise,
    "div.Tensor": _elementwise,
    "gelu.default": _unary,
    "gelu_backward.default": _elementwise,
    "relu.default": _unary,
    "threshold_backward.default": _elementwise,
    "silu.default": _unary,
    "silu_backward.default": _elementwise,
    "sigmoid.default": _unary,
    "sigmoid_backward.default": _elementwise,
    "tanh.default": _unary,
    "tanh_backward.default": _elementwise,
    "hardtanh.default": _unary,
    "hardtanh_backward.default": _elementwise,
    "neg.default": _unary,
    "exp.default": _unary,
    "_softmax_backward_data.default": _softmax_backward,
    "mm.default": _mm,
    "addmm.default": _addmm,
    "bmm.default": _bmm,
    "sum.dim_IntList": _reduction,
    "mean.dim": _reduction,
    "roll.default": _roll,
    "native_layer_norm.default": _layer_norm,
    "native_layer_norm_backward.default": _layer_norm_backward,
    "_fused_rms_norm.default": rms_norm_outputs,
    "_fused_rms_norm_backward.default": rms_norm_backward_outputs,
    "native_batch_norm.default": _batch_norm,
    "native_batch_norm_backward.default": _batch_norm_backward,
    "_foreach_sqrt.default": _each,
}
