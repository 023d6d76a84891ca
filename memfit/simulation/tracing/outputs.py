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
from memfit.simulation.tracing.memory_formats import is_in_a_format
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
    # The few tensors on the CPU are computed, because a step may read their values.
    is_counter = bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_meta
    quick = None if kwargs or is_counter else _quick_of(func)
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


def _arithmetic(first: Any, *rest: Any) -> torch.Tensor | None:
    """Handle two tensors, or a tensor and numbers, which leave the strides as they are."""
    if not any(isinstance(other, torch.Tensor) for other in rest):
        is_plain = type(first) is torch.Tensor and first.is_floating_point()
        return torch.empty_like(first) if is_plain and is_in_a_format(first) else None
    return _elementwise(first, *rest)


def _elementwise(first: Any, *rest: Any) -> torch.Tensor | None:
    """Handle tensors of one type, which a kernel reads in this order, whatever numbers it reads."""
    if not (type(first) is torch.Tensor and first.is_floating_point()):
        return None
    tensors = [first, *(other for other in rest if isinstance(other, torch.Tensor))]
    if any(other.dtype is not first.dtype for other in tensors):
        return None
    is_broadcast = any(other.shape != first.shape for other in tensors)
    found = _broadcast(tensors) if is_broadcast else _laid_out(tensors)
    return _iterated(*tensors) if found is None else found


def _from_input(gradient: torch.Tensor, data: torch.Tensor, *_: Any) -> torch.Tensor | None:
    """Handle the gradient of an activation whose kernel reads the input first."""
    return _elementwise(data, gradient)


def _unary(data: torch.Tensor, *_: Any) -> torch.Tensor | None:
    """Handle one tensor, whatever numbers there are besides."""
    return _laid_out([data]) if data.is_floating_point() else None


def _laid_out(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the output of tensors of one shape that all have one of torch's two layouts.

    What is contiguous in both layouts gets the first, whatever its strides.

    Source: `TensorIteratorBase::compute_fast_setup_type` in aten/src/ATen/TensorIterator.cpp.
    """
    for layout in (torch.contiguous_format, torch.channels_last):
        if all(tensor.is_contiguous(memory_format=layout) for tensor in tensors):
            return torch.empty_like(tensors[0], memory_format=layout)
    return None


def _iterated(*tensors: torch.Tensor) -> torch.Tensor | None:
    """Return the output of a kernel that reads two tensors of any layouts.

    The meta device would not lay it out as the kernel does: it computes some gradients by several
    operations, and converts tensors of half precision before.
    """
    if len(tensors) != 2:  # noqa: PLR2004
        return None
    made = torch.add(
        *(
            torch.empty_strided(t.shape, t.stride(), dtype=torch.float32, device=t.device)
            for t in tensors
        )
    )
    return tensors[0].new_empty_strided(made.shape, made.stride())


def _broadcast(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Handle contiguous tensors whose shapes broadcast to the first one's shape."""
    first = tensors[0]
    for other in tensors:
        if not (
            other.is_contiguous()
            and other.ndim == first.ndim
            and all(o in (1, f) for o, f in zip(other.shape, first.shape, strict=True))
        ):
            return None
    return torch.empty_like(first)


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
    if weight is not None and weight.dtype is not data.dtype:
        return None
    if tuple(data.shape[data.ndim - len(shape) :]) != tuple(shape):
        return None
    rows = (*data.shape[: data.ndim - len(shape)], *(1,) * len(shape))
    output = torch.empty_like(data, memory_format=torch.contiguous_format)
    return (output, *(data.new_empty(rows, dtype=torch.float32) for _ in range(2)))


def _layer_norm_backward(
    _gradient: torch.Tensor, data: torch.Tensor, _shape: Any, _mean: Any, _rstd: Any, *rest: Any
) -> tuple[torch.Tensor | None, ...]:
    *parameters, needed = rest
    tensors = (data, *parameters)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if wanted and tensor is not None
        else None
        for tensor, wanted in zip(tensors, needed, strict=True)
    )


def _unfolded(data: torch.Tensor, *args: Any) -> torch.Tensor:
    return _resized_from(data, torch.ops.aten.im2col.default(data, *args))


def _folded(data: torch.Tensor, *args: Any) -> torch.Tensor:
    return _resized_from(data, torch.ops.aten.col2im.default(data, *args))


def _resized_from(data: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return an output that was made as large as the input, and then resized."""
    if result.numel() >= data.numel():
        return result
    return data.new_empty(data.numel()).as_strided(result.shape, result.stride())


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
    dtype = torch.float32 if weight is None else weight.dtype
    return (
        torch.empty_like(data) if needed[0] else None,
        data.new_empty(channels, dtype=dtype) if needed[1] and weight is not None else None,
        data.new_empty(channels, dtype=dtype) if needed[2] else None,
    )


def _each(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    if not all(t.is_floating_point() and is_in_a_format(t) for t in tensors):
        return None
    return [torch.empty_like(tensor) for tensor in tensors]


_QUICK: Final[dict[str, Callable[..., Any]]] = {
    "add.Tensor": _arithmetic,
    "sub.Tensor": _arithmetic,
    "mul.Tensor": _arithmetic,
    "div.Tensor": _arithmetic,
    "gelu.default": _unary,
    "gelu_backward.default": _elementwise,
    "relu.default": _unary,
    "threshold_backward.default": _from_input,
    "silu.default": _unary,
    "silu_backward.default": _elementwise,
    "sigmoid.default": _unary,
    "sigmoid_backward.default": _elementwise,
    "tanh.default": _unary,
    "tanh_backward.default": _elementwise,
    "hardtanh.default": _arithmetic,
    "hardswish.default": _unary,
    "hardsigmoid.default": _unary,
    "elu.default": _unary,
    "leaky_relu.default": _unary,
    "mish.default": _unary,
    "mish_backward.default": _elementwise,
    "softplus.default": _unary,
    "clamp.default": _unary,
    "sqrt.default": _unary,
    "rsqrt.default": _unary,
    "abs.default": _unary,
    "pow.Tensor_Scalar": _unary,
    "maximum.default": _elementwise,
    "minimum.default": _elementwise,
    "hardtanh_backward.default": _elementwise,
    "elu_backward.default": _elementwise,
    "hardsigmoid_backward.default": _elementwise,
    "hardswish_backward.default": _elementwise,
    "leaky_relu_backward.default": _from_input,
    "softplus_backward.default": _elementwise,
    "neg.default": _unary,
    "exp.default": _unary,
    "_softmax_backward_data.default": _softmax_backward,
    "mm.default": _mm,
    "addmm.default": _addmm,
    "bmm.default": _bmm,
    "sum.dim_IntList": _reduction,
    "mean.dim": _reduction,
    "im2col.default": _unfolded,
    "col2im.default": _folded,
    "roll.default": _roll,
    "native_layer_norm.default": _layer_norm,
    "native_layer_norm_backward.default": _layer_norm_backward,
    "_fused_rms_norm.default": rms_norm_outputs,
    "_fused_rms_norm_backward.default": rms_norm_backward_outputs,
    "native_batch_norm.default": _batch_norm,
    "native_batch_norm_backward.default": _batch_norm_backward,
    "_foreach_sqrt.default": _each,
}
