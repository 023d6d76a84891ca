"""What a user says about a batch, and what a batch shows by itself.

Each part of a batch is named by the Python expression that reaches it (`batch[0]['mask']`).
`BatchRules` holds what the user said about the parts. `entries_of` reads how many entries each part
has.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import difflib
import enum
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from memfit.errors import UsageError
from memfit.step.leaves import is_number, is_part, num_along
from memfit.step.nesting import leaves_of, opened

__all__ = ["ROOT", "BatchRules", "entries_of", "holds_parts", "is_plain"]

ROOT: Final = "batch"
"""The name of the whole batch."""

_PLAIN: Final = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    enum.Enum,
    decimal.Decimal,
    dt.date,
    dt.timedelta,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    torch.Generator,
    nn.Module,
)


@dataclasses.dataclass(frozen=True, slots=True)
class BatchRules:
    """What a user says about a batch.

    Args:
        dims: For some parts of the batch, the dimension that counts the samples. It is `None` for a
            part that belongs to all samples, and 0 for a list whose entries are the samples. Keys
            are written as in error messages (`"batch[0]['mask']"`). `"mask"` is short for
            `"batch['mask']"`.
        cut: A function `cut(batch, start, stop)` that returns the samples from `start` up to, but
            not including, `stop`.
        count: A function that returns the number of samples in a batch.
        num_inputs: The number of leading elements of a flat batch that are inputs.
    """

    dims: Mapping[str | int, int | None] = dataclasses.field(default_factory=dict)
    cut: Callable[[Any, int, int], Any] | None = None
    count: Callable[[Any], int] | None = None
    num_inputs: int = 1

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        dims: object = self.dims
        if not isinstance(dims, Mapping):
            raise UsageError(
                f"batch_dims must be a dictionary, not {type(self.dims).__name__}: "
                'write {"batch[1]": None} for a part that belongs to all samples.'
            )
        for key, dim in dims.items():
            if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):
                raise UsageError(
                    f"batch_dims[{key!r}] must be a dimension from 0, or None for a part that "
                    f"belongs to all samples, not {dim!r}."
                )
        for name, function in (("cut", self.cut), ("count", self.count)):
            if function is not None and not callable(function):
                raise UsageError(f"{name} must be a function, not {type(function).__name__}.")

    def by_path(self, batch: Any) -> dict[str, int | None]:
        """Return the dimension that the user gave for each path of a batch.

        Raises:
            UsageError: The batch has no part with the name of a key.
        """
        if not self.dims:
            return {}
        paths = dict.fromkeys(_paths(batch))
        said: dict[str, int | None] = {}
        for key, dim in self.dims.items():
            names = (key, f"{ROOT}[{key!r}]", f"{ROOT}.{key}")
            path = next((name for name in names if name in paths), None)
            if path is None:
                near = difflib.get_close_matches(str(key), map(str, paths), n=1, cutoff=0)
                instead = f"; the nearest is {str(near[0])!r}" if near else ""
                raise UsageError(f"batch_dims has {key!r}, which the batch does not have{instead}.")
            said[str(path)] = dim
        return said


def entries_of(batch: Any, rules: BatchRules) -> Iterator[tuple[int, str]]:
    """Yield each number that could be the number of samples, with the part that has it."""
    yield from _entries(batch, ROOT, rules.by_path(batch), None)


def _entries(
    value: Any, path: str, said: Mapping[str, int | None], dim: int | None
) -> Iterator[tuple[int, str]]:
    is_told = path in said
    if is_told:
        dim = said[path]
        if dim is None:
            return
    if is_part(value):
        num = num_along(value, dim or 0)
        if num is not None:
            yield num, path
        return
    container = opened(value)
    if container is None:
        return
    is_list = container.is_sequence and path != ROOT
    if is_list and container.values and not any(one.startswith(path + "[") for one in said):
        yield len(container.values), path
    if is_list and is_told:
        return
    for key, inner in zip(container.keys, container.values, strict=True):
        found = list(_entries(inner, path + key, said, dim))
        yield from found
        # In a list of arguments, all parts have as many samples as the first one.
        if is_list and found and not any(one.startswith(path) for one in said):
            return


def _paths(value: Any, path: str = ROOT) -> Iterator[str]:
    yield path
    container = opened(value)
    if container is not None:
        for key, inner in zip(container.keys, container.values, strict=True):
            yield from _paths(inner, path + key)


def is_plain(value: object) -> bool:
    """Whether an object seems to belong to the batch as a whole."""
    if (
        isinstance(value, _PLAIN)
        or is_number(value)
        or (is_part(value) and num_along(value) is None)
    ):
        return True
    if hasattr(type(value), "__len__") or hasattr(type(value), "__getitem__"):
        return False
    held = getattr(value, "__dict__", {}).values()
    return not any(is_part(inner) or opened(inner) for inner in held)


def holds_parts(values: Sequence[Any]) -> bool:
    """Whether the contents hold tensors or arrays with dimensions, at any depth."""
    return any(
        is_part(leaf) and num_along(leaf) is not None
        for value in values
        for leaf in leaves_of(value)
    )
