"""Runs a whole step in float64, even if the model's or the loss's code names other types.

Parameters and buffers are converted once. Forward, loss and backward also create tensors: zeros for
a first hidden state, one-hot targets, masks, class weights that a function holds. These are float32
because the code or torch's default says so. This module makes them float64 in every operation. A
requested type is replaced by float64, and a narrower operand is converted.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memfit._torch_private import convert_tensors, dispatched, schema_of

__all__ = ["as_they_are", "in_float64", "widen"]

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


_PAUSED: contextvars.ContextVar[bool] = contextvars.ContextVar("_PAUSED", default=False)


def widen(module: nn.Module) -> None:
    """Convert parameters and buffers to double precision in place, complex ones as well."""
    convert_tensors(module, _widened)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Make every operation of the block compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with dispatched(_run):
            yield
    finally:
        torch.set_default_dtype(before)


class _Kind(enum.Enum):
    """What an operation does with its arguments."""

    WRITES = enum.auto()
    VIEWS = enum.auto()
    COMPUTES = enum.auto()


@functools.cache
def _kind_of(func: Any) -> _Kind:
    schema = schema_of(func)
    infos = [one.alias_info for one in (*schema.arguments, *schema.returns)]
    if any(info is not None and info.is_write for info in infos):
        return _Kind.WRITES
    return _Kind.VIEWS if any(info is not None for info in infos) else _Kind.COMPUTES


@contextlib.contextmanager
def as_they_are() -> Iterator[None]:
    """Do not change types in the block, for copies that are restored later."""
    before = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(before)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _PAUSED.get():
        return func(*args, **kwargs)
    kind = _kind_of(func)
    # A view has to stay a view, so that values written to it are not lost.
    convert = _wider if kind is _Kind.COMPUTES else _wider_type
    args = tuple(map(convert, args))
    if kwargs:
        kwargs = {name: convert(value) for name, value in kwargs.items()}
    if kind is _Kind.WRITES:
        args = _as_written(func, args)
    return func(*args, **kwargs)


def _wider(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _widened(value)
    if isinstance(value, (list, tuple)):
        return [_wider(one) for one in value]
    return _wider_type(value)


def _wider_type(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _widened(value: torch.Tensor) -> torch.Tensor:
    wider = _WIDER.get(value.dtype)
    return value if wider is None or value.layout is not torch.strided else value.to(wider)


def _as_written(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert values written into a tensor to its type, because the tensor keeps its type."""
    written = [
        value
        for argument, value in zip(schema_of(func).arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    kinds = {one.dtype for one in written if isinstance(one, torch.Tensor)}
    if len(kinds) != 1 or not (kind := kinds.pop()).is_floating_point:
        return args

    def fitted(value: Any) -> Any:
        is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(kind) if is_number and value.dtype is not kind else value

    return tuple(map(fitted, args))
