"""Computes on the host what a few kernels would compute, where all values are known and few.

Kernels do nothing on a rehearsed card. But a mask of tokens comes from the host, and `mask.all()`
is cheap. So what these operations give is written into the device's memory: fills, copies and
casts, comparisons, logic, sums, extremes, and the places of true entries. Each operation runs on
the card first, so memory is taken as ever. What follows from a value that no kernel computed stays
unknown.

An operation comes here by a kernel of Python at the dispatcher's key `BackendSelect`. It is below
autograd, autocast and tracing, and torch has no kernel of its own there for these operations.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .internals import Dispatch
from .reads import Reads

__all__ = ["Values"]

_MAX_NUMBERS = 1 << 12
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
# These read from the device themselves.
_READERS = ("nonzero", "equal")
_OPERATIONS = (
    *("fill_.Scalar", "fill_.Tensor", "copy_", "arange.start_out", *_READERS),
    *(f"{name}.{kind}" for name in _COMPARISONS for kind in ("Scalar", "Tensor")),
    *("all", "all.dim", "any", "any.dim", "max", "min", "sum", "sum.dim_IntList", "cumsum"),
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "cat"),
    *(f"bitwise_{name}.Tensor" for name in ("and", "or")),
    *("bitwise_not", "logical_not", "logical_and", "logical_or"),
)


class Values:
    """The values of small tensors.

    Args:
        torch: The module torch.
        reads: Counts the reads. Those that an operation makes of known values do not count.
        guarded: A function that wraps another function so that it never raises.
    """

    def __init__(self, torch: ModuleType, reads: Reads, guarded: Callable[[Any], Any]) -> None:
        self._torch = torch
        self._reads = reads
        self._knows = guarded(self._are_known)
        self._dispatch = Dispatch(torch)
        self._follow = guarded(self._compute)
        self._device = ctypes.CDLL(None)
        self._library: Any = None

    def begin(self) -> None:
        """Begin to compute."""
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._device.memfit_rehearsal_copy.argtypes = [pointer, pointer, size]
        self._device.memfit_rehearsal_forget.argtypes = [pointer, size]
        self._library = self._torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _OPERATIONS:
                operation = self._dispatch.operation(name)
                if operation is not None:
                    kernel = self._kernel(name, operation)
                    self._library.impl(name, kernel, "BackendSelect", with_keyset=True)

    def end(self) -> None:
        """Compute no longer."""
        if self._library is not None:
            self._dispatch.drop(self._library)
            self._library = None

    def _kernel(self, name: str, operation: Any) -> Any:
        below = self._dispatch.keys_below
        tensor, fill = self._torch.Tensor, self._dispatch.operation("fill_.Scalar")
        positions = self._dispatch.tensor_positions(operation)

        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            # The dispatcher gives a number of Python for a tensor that was made of one.
            if any(not isinstance(args[at], tensor) for at in positions):
                if name == "copy_":
                    return fill.redispatch(keys & below, *args[:2])
                args = self._with_tensors(args, positions)
            if name in _READERS and args[0].is_cuda:
                with self._reads.muted(self._knows(args)):
                    result = operation.redispatch(keys & below, *args, **kwargs)
            else:
                result = operation.redispatch(keys & below, *args, **kwargs)
            owner = result if isinstance(result, tensor) else args[0]
            if owner.is_cuda and owner.numel() <= _MAX_NUMBERS:
                known = self._follow(name, operation, args, kwargs, result)
                return result if known is None else known
            return result

        return kernel

    def _with_tensors(self, args: tuple[Any, ...], positions: tuple[int, ...]) -> tuple[Any, ...]:
        """Return arguments with tensors in place of numbers."""
        torch, changed = self._torch, list(args)
        other = next((args[at] for at in positions if isinstance(args[at], torch.Tensor)), None)
        for at in positions:
            number = args[at]
            if isinstance(number, torch.Tensor):
                continue
            common = None if other is None else torch.result_type(other, number)
            # A number does not change the type of a tensor of its kind, and has all its digits.
            if other is not None and other.dim() and common is other.dtype:
                common = torch.float64 if type(number) is float else common
            changed[at] = torch.tensor(number, dtype=common)
        return tuple(changed)

    def _are_known(self, args: tuple[Any, ...]) -> bool:
        return all(known for _, known in map(self._values_of, args))

    def _compute(
        self, name: str, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """Write the result's values if they are known. Return a result that replaces it, if any."""
        torch = self._torch
        if torch.cuda.is_current_stream_capturing():
            return None
        is_in_place = name.startswith(("fill_", "copy_", "arange"))
        read = [self._values_of(arg) for arg in (args[1:] if is_in_place else args)]
        is_known = all(known for _, known in read)
        values = [value for value, _ in read]
        if not is_known:
            computed = self._decided(name, args, read, result)
        elif name == "arange.start_out":
            computed = torch.arange(*args[:3], dtype=result.dtype)
        elif is_in_place:
            computed = torch.as_tensor(values[0], dtype=result.dtype).expand(result.shape)
        else:
            computed = operation(*values, **kwargs)
        if not isinstance(result, torch.Tensor):
            return computed
        if name == "nonzero" and computed is not None:
            result = torch.empty(computed.shape, dtype=computed.dtype, device=result.device)
        self._write(result, computed)
        return result

    def _decided(
        self, name: str, args: tuple[Any, ...], read: list[tuple[Any, bool]], result: Any
    ) -> Any:
        """Return what is certain although some value is not known; `None` if nothing is.

        One side of a logical operation may be enough. And as in an ordinary step, no number is
        infinite or NaN: `isfinite` asks whether a number is itself and is not infinite.
        """
        if name in ("eq.Tensor", "ne.Scalar") and (
            args[1] is args[0] if name == "eq.Tensor" else abs(args[1]) == math.inf
        ):
            return self._torch.ones(result.shape, dtype=result.dtype)
        is_or, is_and = "_or" in name, "_and" in name
        if not (is_or or is_and):
            return None
        for value, known in read:
            if known and result.dtype is self._torch.bool and is_or and bool(value.all()):
                return self._torch.ones(result.shape, dtype=result.dtype)
            if known and is_and and not bool(value.any()):
                return self._torch.zeros(result.shape, dtype=result.dtype)
        return None

    def _values_of(self, argument: Any) -> tuple[Any, bool]:
        """Return an argument on the host, and whether its values are known."""
        torch = self._torch
        if isinstance(argument, list):
            read = [self._values_of(one) for one in argument]
            return [value for value, _ in read], all(known for _, known in read)
        if not isinstance(argument, torch.Tensor):
            return argument, True
        if not self._is_plain(argument) or argument.numel() > _MAX_NUMBERS:
            return None, False
        if not argument.is_cuda:
            return argument, argument.device.type == "cpu"
        extent = _extent(argument)
        if extent > _MAX_NUMBERS:
            return None, False
        if not extent:
            return torch.empty(argument.shape, dtype=argument.dtype), True
        host = torch.empty(extent, dtype=argument.dtype)
        known = self._device.memfit_rehearsal_copy(
            host.data_ptr(), argument.data_ptr(), extent * argument.element_size()
        )
        return host.as_strided(argument.shape, argument.stride()), bool(known)

    def _is_plain(self, tensor: Any) -> bool:
        return tensor.layout is self._torch.strided and not tensor.is_nested

    def _write(self, result: Any, computed: Any) -> None:
        if not self._is_plain(result):
            return
        extent = _extent(result)
        num_bytes, is_whole = extent * result.element_size(), extent == result.numel()
        if not num_bytes:
            return
        if computed is None or not is_whole:
            self._device.memfit_rehearsal_forget(result.data_ptr(), num_bytes)
            return
        host = self._torch.empty(result.numel(), dtype=result.dtype)
        host.as_strided(result.shape, result.stride()).copy_(computed)
        self._device.memfit_rehearsal_copy(result.data_ptr(), host.data_ptr(), num_bytes)


def _extent(tensor: Any) -> int:
    """Return the number of elements from a tensor's first one to its last one."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in steps)
