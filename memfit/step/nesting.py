"""Opens the containers of a batch, and builds them again with other contents.

A container is a dictionary or a mapping of any class (a tokenizer's `BatchEncoding`), a tuple,
list, named tuple or data class, or a class that is registered with `torch.utils._pytree`.
`memfit.step.batches` decides which of the contents are samples.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from memfit._torch_private import pytree
from memfit.errors import WorkloadError

__all__ = ["Opened", "leaves_of", "map_leaves", "opened"]

_SEQUENCES = (list, tuple, collections.deque, collections.UserList)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A container, opened.

    Args:
        keys: The Python expression that reaches each of the contents: `['x']`, `[0]`, `.x`.
        values: The contents.
        close: A function from other contents to a new container of the same kind. The opened one
            is not changed.
        is_sequence: Whether it is a list or a tuple. Its entries may be one for each sample.
    """

    keys: tuple[str, ...]
    values: tuple[Any, ...]
    close: Callable[[Sequence[Any]], Any]
    is_sequence: bool = False


def opened(value: Any) -> Opened | None:
    """Open a container.

    Args:
        value: Anything that a batch may hold.

    Returns:
        Its contents; `None` if it is no container, such as a tensor, array, number, text or other
        object.
    """
    if isinstance(value, (torch.Tensor, torch.Size, PackedSequence, str, bytes, type)):
        return None
    if isinstance(value, Mapping):
        names = tuple(value)
        return Opened(
            keys=tuple(f"[{name!r}]" for name in names),
            values=tuple(value[name] for name in names),
            close=lambda values: _mapping(value, dict(zip(names, values, strict=True))),
        )
    fields = _fields_of(value)
    if fields is not None:
        return Opened(
            keys=tuple(f".{name}" for name in fields),
            values=tuple(getattr(value, name) for name in fields),
            close=lambda values: _object(value, dict(zip(fields, values, strict=True))),
        )
    if isinstance(value, _SEQUENCES):
        return Opened(
            keys=tuple(f"[{index}]" for index in range(len(value))),
            values=tuple(value),
            close=lambda values: _sequence(value, values),
            is_sequence=True,
        )
    return _registered(value)


def _fields_of(value: Any) -> tuple[str, ...] | None:
    """Return the names of an object's fields, if its class defines that it has no others."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(value._fields)
    if dataclasses.is_dataclass(value):
        return tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
    if isinstance(value, types.SimpleNamespace):
        return tuple(vars(value))
    return None


def _registered(value: Any) -> Opened | None:
    contents, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
    if len(contents) == 1 and contents[0] is value:
        return None
    return Opened(
        keys=tuple(f"[{index}]" for index in range(len(contents))),
        values=tuple(contents),
        close=lambda values: pytree.tree_unflatten(list(values), spec),
    )


def _mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(like) is dict:
        return items
    if not isinstance(like, MutableMapping):
        # A mapping that cannot be written to may not be built again. A dict is read alike.
        return items

    def refilled() -> Any:
        made: Any = copy.copy(like)
        for key, value in items.items():
            made[key] = value
        return made

    return _built(like, refilled)


def _object(like: Any, attributes: dict[str, Any]) -> Any:
    if isinstance(like, tuple):
        return _built(like, lambda: type(like)(*attributes.values()))

    def refilled() -> Any:
        # The class is not called, because it may compute, check and refuse values.
        made = copy.copy(like)
        for name, value in attributes.items():
            object.__setattr__(made, name, value)
        return made

    return _built(like, refilled)


def _sequence(like: Any, values: Sequence[Any]) -> Any:
    if isinstance(like, collections.deque):
        return collections.deque(values, like.maxlen)
    return _built(like, lambda: type(like)(values))


def _built(like: Any, build: Callable[[], Any]) -> Any:
    """Build a container of a user's class.

    Raises:
        WorkloadError: The class raised an error when it was built again.
    """
    try:
        return build()
    except Exception as error:
        raise WorkloadError(
            f"A {type(like).__name__} inside the batch could not be built with "
            f"other contents ({error}). Give cut=function, a function cut(batch, "
            "start, stop) that returns those samples."
        ) from error


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to every value in a batch that is no container.

    Args:
        function: A function from a leaf to the value that replaces it.
        value: A batch of any nesting.

    Returns:
        New containers of the same kinds.
    """
    container = opened(value)
    if container is None:
        return function(value)
    return container.close([map_leaves(function, inner) for inner in container.values])


def leaves_of(value: Any) -> list[Any]:
    """Return every value in a batch that is no container."""
    container = opened(value)
    if container is None:
        return [value]
    return [leaf for inner in container.values for leaf in leaves_of(inner)]
