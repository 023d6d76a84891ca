"""What a user says about a batch, and what a batch says by itself.

The parts of a batch have names, as Python reaches them (`batch[0]['mask']`). `BatchRules` holds
what was said of them; `entries_of` reads how many entries each of them has.
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
"""What the whole batch is called."""

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
        dims: For a part of the batch the dimension that counts the samples; `None` for a part that
            belongs to all of them, and 0 for a list whose entries are the samples. Keys are written
            as errors write them (`"batch[0]['mask']"`); `"mask"` is short for `"batch['mask']"`.
        cut: A function `cut(batch, start, stop)` that returns those samples of a batch.
        count: A function that returns how many samples a batch has.
        num_inputs: How many leading elements of a flat batch are inputs.
    """

    dims: Mapping[str | int, int | None] = dataclasses.field(default_factory=dict)
    cut: Callable[[Any, int, int], Any] | None = None
    count: Callable[[Any], int] | None = None
    num_inputs: int = 1

    def __post_init__(self) -> None:
        """Refuse what says nothing."""
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
        """Return what was said for each path of a batch.

        Raises:
            UsageError: A key is no part of the batch.
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
                raise UsageError(f"batch_dims has {key!r}, which the batch has not{instead}.")
            said[str(path)] = dim
        return said


def entries_of(batch: Any, rules: BatchRules) -> Iterator[tuple[int, str]]:
    """Yield what could be the number of samples, and the part that says so."""
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
        # In a list of arguments the first part says what all of them have to.
        if is_list and found and not any(one.startswith(path) for one in said):
            return


def _paths(value: Any, path: str = ROOT) -> Iterator[str]:
    yield path
    container = opened(value)
    if container is not None:
        for key, inner in zip(container.keys, container.values, strict=True):
            yield from _paths(inner, path + key)


def is_plain(value: object) -> bool:
    """Whether an object belongs to a batch as a whole, as far as can be seen."""
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
    """Whether there are tensors or arrays with dimensions among contents, however deep."""
    return any(
        is_part(leaf) and num_along(leaf) is not None
        for value in values
        for leaf in leaves_of(value)
    )
