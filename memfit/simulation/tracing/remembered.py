"""Remembers what operations on meta tensors return, because a network repeats its layers.

PyTorch's own meta functions take up to some hundred microseconds. What they return depends only on
the shapes, strides and types of the arguments, so an operation that was run once is not run again:
its outputs are made anew from their description. An operation that writes to its first argument
returns that argument. Operations that return another view are not remembered.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from memfit._torch_private import schema_of, storage_id

__all__ = ["Remembered"]

_PLAIN: Final = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_META: Final = torch.device("meta")
_MOST: Final = 4096
# What says all about itself. Numbers are listed apart: 1, 1.0 and True are equal, and not the same.
_WORDS: Final = frozenset(
    (type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)
)
_NUMBERS: Final = frozenset((bool, int, float))


class _Unknown(Exception):  # noqa: N818 - it ends a walk, and no caller sees it
    """An argument is not described by its shape alone."""


class Remembered:
    """The outputs of operations, by the operation and the description of its arguments."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Outputs] = {}
        # By the id of the operation, which is kept with it. Its own hash is slow.
        self._kinds: dict[int, tuple[Any, _Kind]] = {}

    def run(
        self,
        run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the outputs of an operation, run only if it is not remembered.

        Args:
            run: Runs it.
            func: The operation.
            args: Its positional arguments.
            kwargs: Its other arguments.
        """
        number = id(func)
        if number not in self._kinds:
            self._kinds[number] = (func, _kind_of(func))
        kind = self._kinds[number][1]
        if kind is _Kind.OTHER:
            return run(func, args, kwargs)
        key: list[Any] = [number]
        try:
            _describe(args, key)
            for name, value in kwargs.items():
                key.append(name)
                _describe_one(value, key)
        except _Unknown:
            return run(func, args, kwargs)
        asked = tuple(key)
        known = self._known.get(asked)
        if known is not None:
            return args[0] if kind is _Kind.WRITES_FIRST else known.made()
        if kind is _Kind.WRITES_FIRST:
            target = args[0]
            before = _looks_of(target)
            result = run(func, args, kwargs)
            found = _NO_OUTPUTS if result is target and _looks_of(target) == before else None
        else:
            result = run(func, args, kwargs)
            found = _outputs_of(result, args)
        if found is not None:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[asked] = found
        return result


class _Kind(enum.Enum):
    """What an operation returns."""

    NEW = enum.auto()
    WRITES_FIRST = enum.auto()
    OTHER = enum.auto()


def _kind_of(func: Any) -> _Kind:
    """Read off an operation's arguments and returns what it returns."""
    schema = schema_of(func)
    first, *rest = schema.arguments or (None,)
    others = (*rest, *schema.returns)
    if first is None or not schema.returns:
        return _Kind.OTHER
    if all(part.alias_info is None for part in (first, *others)):
        return _Kind.NEW
    if (
        first.alias_info is not None
        and first.alias_info.is_write
        and len(schema.returns) == 1
        and schema.returns[0].alias_info is not None
        and schema.returns[0].alias_info.is_write
        and all(part.alias_info is None for part in rest)
    ):
        return _Kind.WRITES_FIRST
    return _Kind.OTHER


def _looks_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.storage_offset(),
        storage_id(storage),
        storage.nbytes(),
    )


def _describe(values: Any, key: list[Any]) -> None:
    for value in values:
        _describe_one(value, key)


def _describe_one(value: Any, key: list[Any]) -> None:
    """Append what decides the outputs to a key.

    Raises:
        _Unknown: The value is no plain meta tensor, and says not all about itself.
    """
    kind = type(value)
    if kind in _PLAIN:
        if not value.is_meta or value.layout is not torch.strided or value.dtype.is_complex:
            raise _Unknown
        key += (value.shape, value.stride(), value.dtype)
    elif kind in _NUMBERS:
        key += (kind, value)
    elif kind in _WORDS:
        key.append(value)
    elif kind is list or kind is tuple or kind is torch.Size:
        key.append(len(value))
        for item in value:
            _describe_one(item, key)
    else:
        raise _Unknown


@dataclasses.dataclass(frozen=True, slots=True)
class _Outputs:
    """The outputs of an operation: each as its shape, strides and type, or `None`.

    Args:
        kind: The class of the sequence in which they are returned; `None` for one tensor alone.
        each: The outputs.
    """

    kind: type | None
    each: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]

    def made(self) -> Any:
        """Make such outputs."""
        made = [
            None if one is None else torch.empty_strided(*one[:2], dtype=one[2], device=_META)
            for one in self.each
        ]
        return made[0] if self.kind is None else self.kind(made)


_NO_OUTPUTS: Final = _Outputs(None, ())


def _outputs_of(result: Any, args: tuple[Any, ...]) -> _Outputs | None:
    """Describe what an operation returned; `None` if that is not only new tensors."""
    kind = None if isinstance(result, torch.Tensor) else type(result)
    if kind not in {None, tuple, list}:
        return None
    outputs: tuple[Any, ...] = (result,) if kind is None else tuple(result)
    owners = {storage_id(tensor.untyped_storage()) for tensor in _tensors_in(args)}
    found: list[Any] = []
    for output in outputs:
        if output is None:
            found.append(None)
            continue
        if type(output) is not torch.Tensor or not _is_new(output):
            return None
        owner = storage_id(output.untyped_storage())
        if owner in owners:
            return None
        owners.add(owner)
        found.append((tuple(output.shape), output.stride(), output.dtype))
    return _Outputs(kind, tuple(found))


def _tensors_in(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors_in(value)
    return found


def _is_new(output: torch.Tensor) -> bool:
    """Whether a tensor fills a storage of its own on the meta device."""
    if not output.is_meta or output.layout is not torch.strided or output.storage_offset():
        return False
    reach = zip(output.shape, output.stride(), strict=True)
    last = sum((size - 1) * step for size, step in reach)
    num_elements = last + 1 if math.prod(output.shape) else 0
    return output.untyped_storage().nbytes() == num_elements * output.element_size()
