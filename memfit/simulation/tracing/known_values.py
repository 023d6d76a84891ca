"""Keeps the values of some tensors of a traced step, though the tensors are on the meta device.

A batch has values, and a mask that a model makes from it has values too. An operation on such
tensors alone is also run on the CPU, beside the trace. So a question about the result
(`if mask.all():`) gets the same answer as in training. A tensor has no known value if it depends on
weights or on random numbers of the device. Every floating-point tensor is taken to be finite,
because training that works has no infinities and no NaNs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from memfit._torch_private import aten, aten_if_there, storage_id
from memfit.simulation.tracing.by_operation import once_per_operation

__all__ = ["NOTHING", "KnownValues", "mapped"]

NOTHING: Final = object()
"""`KnownValues.answer` returns this if the operation has to be run."""

_ATTRIBUTE: Final = "memfit_known"
_CPU: Final = torch.device("cpu")
_META: Final = torch.device("meta")
# Masks and tokens are smaller. Images are larger, but models do not ask about their values.
_MOST_ELEMENTS: Final = 1 << 22
# Modules that read norms of parameters and updates only to scale an update.
_SCALING: Final = ("torch.optim._adafactor",)
_NEAR_FRAMES: Final = 12


class _Known:
    """The value of a tensor, shared with its views.

    Args:
        value: The value, on the CPU.
        owner: A list that all tensors with the same storage share. It is emptied when an unknown
            value is written to the storage.
    """

    __slots__ = ("owner", "value")

    def __init__(self, value: torch.Tensor, owner: list[bool]) -> None:
        self.value = value
        self.owner = owner


class KnownValues:
    """Computes values beside a trace, and answers questions about them."""

    def __init__(self) -> None:
        self.num_answers = 0
        self._index = aten("index.Tensor")
        self._item = aten("_local_scalar_dense.default")
        # By id, because an operation's own hash is slow. None of them ever ends.
        self._finite = {
            id(aten_if_there(f"{name}.default")): answer
            for name, answer in (("isnan", False), ("isinf", False), ("isfinite", True))
        }
        self._compares = {
            id(aten_if_there(f"{name}.{kind}")): name == "ne"
            for name in ("eq", "ne")
            for kind in ("Scalar", "Tensor")
        }

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation that needs values; `NOTHING` for other operations.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its other arguments.
        """
        if func is self._index:
            return self._indexed(*args)
        reads = _reads_values(func)
        if not reads and not _leaves_meta(func, args, kwargs):
            return NOTHING
        if func is self._item and not args[0].is_meta:
            # An optimizer asks each of its counters.
            self.num_answers += 1
            return func(*args)
        known = _values_of((args, kwargs))
        if known is None:
            return 1.0 if func is self._item and _only_scales() else NOTHING
        self.num_answers += 1
        values, named = known
        with torch.no_grad():
            found = func(*values, **named)
        return found if not reads or _is_number(found) else _on_meta(found)

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Keep the values of an operation's result, if they are known.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its other arguments.
            result: The result of the operation.
        """
        if _writes(func):
            self._write(func, args, kwargs)
            return
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if not (isinstance(first, torch.Tensor) and first.is_meta):
            return
        if first.numel() > _MOST_ELEMENTS or _known(first) is not None:
            return
        known = None if _is_random(func) else _values_of((args, kwargs))
        if known is None:
            self._note_finite(func, args, first)
            return
        values, named = known
        # If an operation fails on the CPU, its result is not known.
        with contextlib.suppress(Exception), torch.no_grad():
            _attach(result, func(*values, **named), _owners_in(args))

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = args[0] if args else None
        if not (isinstance(target, torch.Tensor) and target.is_meta):
            return
        held = _known(target)
        if held is None:
            return
        known = None if _is_random(func) else _values_of((args, kwargs))
        if known is not None:
            values, named = known
            with contextlib.suppress(Exception), torch.no_grad():
                func(*values, **named)
                return
        held.owner.clear()

    def _note_finite(self, func: Any, args: tuple[Any, ...], result: torch.Tensor) -> None:
        """Note that a tensor is finite, in each way in which a program can ask for it."""
        answer = self._finite.get(id(func))
        if answer is None and id(func) in self._compares:
            one, other = args[:2]
            is_different = self._compares[id(func)]
            if one is other:
                answer = not is_different
            elif isinstance(other, float) and not math.isfinite(other):
                answer = is_different
        if answer is not None:
            value = torch.full((), answer, dtype=torch.bool).expand(result.shape)
            setattr(result, _ATTRIBUTE, _Known(value, [True]))

    def _indexed(self, data: torch.Tensor, indices: Any) -> Any:
        """Index by a mask as CUDA does, by the positions at which it is true."""
        if not data.is_meta or not any(map(_is_mask, indices)):
            return NOTHING
        places: list[torch.Tensor | None] = []
        for index in indices:
            if not _is_mask(index):
                places.append(index)
                continue
            held = _known(index)
            if held is None:
                return NOTHING
            self.num_answers += 1
            places += [_on_meta(place) for place in held.value.nonzero(as_tuple=True)]
        return self._index(data, places)


def _only_scales() -> bool:
    """Whether the caller only scales something with the number, so that any number will do."""
    frame = inspect.currentframe()
    for _ in range(_NEAR_FRAMES):
        if frame is None:
            break
        if frame.f_globals.get("__name__") in _SCALING:
            return True
        frame = frame.f_back
    return False


def _is_mask(index: Any) -> bool:
    return (
        isinstance(index, torch.Tensor)
        and index.is_meta
        and index.dtype in (torch.bool, torch.uint8)
    )


def _is_number(found: Any) -> bool:
    return isinstance(found, (bool, int, float, complex))


def _known(tensor: torch.Tensor) -> _Known | None:
    held: _Known | None = getattr(tensor, _ATTRIBUTE, None)
    return held if held is not None and held.owner else None


def _values_of(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return arguments with values in place of tensors; `None` if a tensor has no known value."""
    first = arguments[0][0] if arguments[0] else None
    if isinstance(first, torch.Tensor) and first.is_meta and _known(first) is None:
        return None  # As below, and quickly: nearly all operations are on such tensors.
    for tensor in _tensors_in(arguments):
        if tensor.is_meta and _known(tensor) is None:
            return None

    def valued(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            held = _known(leaf) if leaf.is_meta else None
            return leaf.detach() if held is None else held.value
        return _CPU if isinstance(leaf, torch.device) else leaf

    args, kwargs = mapped(valued, arguments)
    return args, kwargs


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the arguments of an operation with a function applied to each.

    Args:
        function: Applied to what is no tuple, list or dictionary.
        value: The arguments, in any nesting of those.
    """
    if isinstance(value, (tuple, list)):
        items = [mapped(function, item) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return function(value)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _owners_in(args: Any) -> dict[int, list[bool]]:
    """Return the owners of the storages of known arguments."""
    owners = {}
    for tensor in _tensors_in(args):
        held = _known(tensor) if tensor.is_meta else None
        if held is not None:
            owners[storage_id(held.value.untyped_storage())] = held.owner
    return owners


def _attach(result: Any, value: Any, owners: dict[int, list[bool]]) -> None:
    if isinstance(result, torch.Tensor):
        if result.is_meta and isinstance(value, torch.Tensor):
            owner = owners.get(storage_id(value.untyped_storage()), [True])
            setattr(result, _ATTRIBUTE, _Known(value, owner))
    elif isinstance(result, (tuple, list)):
        for one, other in zip(result, value, strict=True):
            _attach(one, other, owners)


def _on_meta(value: Any) -> Any:
    """Return tensors on the meta device that have the same shapes and these known values."""
    if isinstance(value, torch.Tensor):
        empty = torch.empty_like(value, device=_META)
        setattr(empty, _ATTRIBUTE, _Known(value, [True]))
        return empty
    return type(value)(map(_on_meta, value)) if isinstance(value, (tuple, list)) else value


@once_per_operation
def _reads_values(func: Any) -> bool:
    """Whether an operation cannot be run without values."""
    tags = set(func.tags)
    return bool(tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


@once_per_operation
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@once_per_operation
def _writes(func: Any) -> bool:
    """Whether an operation writes to its arguments: its name ends with `_`, or it has an `out`."""
    name, _, overload = func.__name__.partition(".")
    return name.endswith("_") or "out" in overload


def _leaves_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies from the meta device to the CPU."""
    device = kwargs.get("device")
    return (
        device is not None
        and torch.device(device).type == "cpu"
        and bool(args)
        and isinstance(args[0], torch.Tensor)
        and args[0].is_meta
        and "copy" in func.__name__
    )
