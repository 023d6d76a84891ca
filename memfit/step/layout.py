"""Finds out where the samples are in a batch, or takes it from the user.

A tensor holds samples along its first dimension. A list with one entry for each sample holds
samples too. The batch itself must show which parts hold samples. If it can be read in two ways, or
in none, it is refused, and the message says what the user can give. `memfit.step.batches` cuts
batches.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from memfit.errors import WorkloadError
from memfit.step.batch_rules import ROOT, BatchRules, entries_of, holds_parts, is_plain
from memfit.step.leaves import is_array, is_part, num_along
from memfit.step.nesting import Opened, opened
from memfit.step.refusals import check_batch, no_reading, told, two_sizes

__all__ = ["Kind", "Role", "Roles", "roles_of"]


class Kind(enum.Enum):
    """How a part of a batch relates to the samples."""

    SHARED = "belongs to all samples"
    SAMPLES = "holds the samples along a dimension"
    ENTRIES = "is a list of one entry for each sample"
    INSIDE = "is a container of other parts"


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """How one part of a batch relates to the samples.

    Args:
        kind: The kind of part.
        dim: The dimension that counts the samples.
        inside: The roles of a container's contents.
    """

    kind: Kind
    dim: int = 0
    inside: tuple[Role, ...] = ()


_SHARED: Final = Role(Kind.SHARED)
_ENTRIES: Final = Role(Kind.ENTRIES)
_IMAGE_DIMS: Final = 3
_MOST_CHANNELS: Final = 4
_FEWEST_OBJECTS: Final = 3
_FEWEST_IMAGES: Final = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Roles:
    """Where the samples of a batch are.

    Args:
        num_samples: The number of samples.
        role: The role of the batch itself.
        doubt: The reason why the batch must not be cut; `None` if it may be cut.
    """

    num_samples: int
    role: Role
    doubt: str | None = None


def roles_of(
    batch: Any,
    rules: BatchRules,
    *,
    num_samples: int | None = None,
    other: tuple[Any, int] | None = None,
) -> Roles:
    """Find out where the samples of a batch are.

    Args:
        batch: A batch of any nesting.
        rules: What the user says about the batch.
        num_samples: The number of samples, if it is known.
        other: A similar batch with another known number of samples. The parts whose sizes differ in
            the same way hold the samples.

    Raises:
        WorkloadError: It cannot be told where the samples are, or there are none.
        UsageError: The rules name a part that the batch does not have.
    """
    reader = _Reader(rules.by_path(batch), rules.num_inputs)
    strange = _list_of_samples(batch, reader.said)
    if strange is not None:
        raise WorkloadError(strange)
    if num_samples is not None:
        tried = [num_samples]
    else:
        tried = list(dict.fromkeys(size for size, _ in entries_of(batch, rules)))
    batches = (batch,) if other is None else (batch, other[0])
    more = () if other is None else (other[1],)
    for reader.lists_are_arguments in (True, False):
        found = {size: reader.readings(batches, ROOT, (size, *more)) for size in tried}
        found = {size: readings for size, readings in found.items() if readings}
        if found:
            break
    if not found:
        check_batch(batch)
        raise WorkloadError(no_reading(batch, rules, num_samples))
    if len(found) > 1:
        raise WorkloadError(two_sizes(batch, rules, list(found)))
    ((size, readings),) = found.items()
    if size < 1:
        raise WorkloadError("The example batch is empty: its leading dimension is 0.")
    doubt = None
    if len(readings) > 1:
        doubt = (
            f"The batch has {size} samples, and a list in it has {size} entries "
            f"whose leading dimension is {size} as well ({reader.doubted}). So "
            "memfit cannot tell which of them are the samples. Give "
            f"{told(reader.doubted, 0)} if its entries are, "
            f"{told(reader.doubted + '[0]', 0)} if not, or a batch of another size."
        )
    elif other is None:
        doubt = _square(batch, readings[0], size, reader.said)
    return Roles(size, readings[0], doubt)


class _Reader:
    """Reads batches under the assumption that they have a given number of samples.

    Args:
        said: What the user says about the parts, by path.
        num_inputs: The number of leading elements of a flat batch that are inputs.
    """

    def __init__(self, said: Mapping[str, int | None], num_inputs: int) -> None:
        self.said = said
        self.lists_are_arguments = True
        self.doubted = ""
        self._argument_lists = {f"{ROOT}[0]"} if num_inputs == 1 else set()
        self._argument_lists.add(f"{ROOT}[{num_inputs}]")

    def readings(
        self, values: tuple[Any, ...], path: str, sizes: tuple[int, ...], said: int | None = None
    ) -> list[Role]:
        """Return the roles that a part can have. The result is empty if no role fits.

        Args:
            values: The part, from one batch or from two.
            path: The name of the part.
            sizes: The number of samples in each batch.
            said: The dimension that the user gave for the container of the part.
        """
        if path in self.said:
            said = self.said[path]
            if said is None:
                return [_SHARED]
        if all(is_part(value) for value in values):
            return self._part(values, sizes, said)
        containers = [opened(value) for value in values]
        if any(container is None for container in containers):
            return [_SHARED] if all(is_plain(value) for value in values) else []
        return self._container([c for c in containers if c is not None], path, sizes, said)

    def _part(
        self, values: tuple[Any, ...], sizes: tuple[int, ...], said: int | None
    ) -> list[Role]:
        def counts(dim: int) -> bool:
            return all(
                num_along(value, dim) == size for value, size in zip(values, sizes, strict=True)
            )

        if said is not None:
            return [Role(Kind.SAMPLES, said)] if counts(said) else []
        if num_along(values[0]) is None:
            return [_SHARED]
        if counts(0):
            return [Role(Kind.SAMPLES)]
        if len(values) == 1:
            return []
        dims = [dim for dim in range(getattr(values[0], "ndim", 0)) if counts(dim)]
        if len(dims) == 1:
            return [Role(Kind.SAMPLES, dims[0])]
        shapes = {tuple(getattr(value, "shape", ())) for value in values}
        return [_SHARED] if not dims and len(shapes) == 1 else []

    def _container(
        self, containers: list[Opened], path: str, sizes: tuple[int, ...], said: int | None
    ) -> list[Role]:
        first = containers[0]
        is_list = first.is_sequence and path != ROOT
        lengths = tuple(len(container.values) for container in containers)
        readings = []
        is_told = is_list and path in self.said
        is_entered = any(told.startswith(path + "[") for told in self.said)
        if is_list and not is_entered and lengths == sizes and _are_alike(first.values):
            readings.append(_ENTRIES)
        if is_told:
            return readings
        is_argument_list = self.lists_are_arguments and path in self._argument_lists
        if is_argument_list and not _look_like_samples(first.values):
            readings = []
        if any(container.keys != first.keys for container in containers):
            return readings
        inner = [
            self.readings(tuple(c.values[i] for c in containers), path + key, sizes, said)
            for i, key in enumerate(first.keys)
        ]
        # Two readings are enough to show that the batch is ambiguous.
        combined = itertools.islice(itertools.product(*inner), 2)
        insides = [Role(Kind.INSIDE, inside=inside) for inside in combined]
        if is_list:
            insides = [role for role in insides if _has_samples(role)]
            is_shared = not first.values or (len(containers) > 1 and len(set(lengths)) == 1)
            if is_shared and not (readings or insides or holds_parts(first.values)):
                return [_SHARED]
        if readings and insides:
            self.doubted = path
        return readings + insides


def _has_samples(role: Role) -> bool:
    if role.kind is Kind.INSIDE:
        return any(map(_has_samples, role.inside))
    return role.kind is not Kind.SHARED


def _are_alike(values: Sequence[Any]) -> bool:
    """Whether the entries can form one list: their tensors have one type and as many dimensions."""
    kinds = {
        (type(value), value.ndim, value.dtype)
        if isinstance(value, torch.Tensor) or is_array(value)
        else (float if type(value) is int else type(value),)
        for value in values
        if value is not None
    }
    return len(kinds) <= 1


def _look_like_samples(values: Sequence[Any]) -> bool:
    """Whether the entries of a list may be samples and not arguments: objects or images."""
    if all(isinstance(value, torch.Tensor) or is_array(value) for value in values):
        return all(value.ndim == _IMAGE_DIMS and len(value) <= _MOST_CHANNELS for value in values)
    kinds = {
        None if container is None else (type(value), container.keys)
        for value in values
        for container in [opened(value)]
    }
    return len(kinds) == 1 and None not in kinds


def _list_of_samples(batch: Any, said: Mapping[str, int | None]) -> str | None:
    """Return a sentence about a batch that is a list of samples in place of inputs and targets."""
    if said or not isinstance(batch, (list, tuple)) or hasattr(batch, "_fields"):
        return None
    are_tensors = any(isinstance(value, torch.Tensor) or is_array(value) for value in batch)
    # A batch may have two alike dictionaries, or query, key and value.
    fewest = _FEWEST_IMAGES if are_tensors else _FEWEST_OBJECTS
    if len(batch) < fewest or not (_are_alike(batch) and _look_like_samples(batch)):
        return None
    kind = type(batch).__name__
    return (
        f"The batch is a {kind} of {len(batch)} entries of the same kind, and memfit reads the "
        f"elements of a {kind} as inputs and targets. If each of them is a sample, give the {kind} "
        f"as the only input: (batch,), with {told(ROOT + '[0]', 0)}. If not, give batch_dims for "
        "one of them."
    )


def _square(batch: Any, role: Role, size: int, said: Mapping[str, int | None]) -> str | None:
    """Return a sentence about a (length, length) mask that looks like samples; else `None`."""
    parts = list(_sample_parts(batch, role, ROOT))
    if not any(part.ndim > 2 and part.shape[:2] == (size, size) for _, part in parts):  # noqa: PLR2004
        return None
    for path, part in parts:
        is_mask = tuple(part.shape) == (size, size) and path not in said
        if is_mask and size > 1 and (part.is_floating_point() or part.dtype is torch.bool):
            return (
                f"{path} is {size} x {size} beside {size} samples of length {size}. So "
                "memfit cannot tell whether it holds a row for each sample. Give "
                f"{told(path, None)} if it belongs to all samples, {told(path, 0)} if "
                "not, or a batch of another size."
            )
    return None


def _sample_parts(value: Any, role: Role, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if role.kind is Kind.SAMPLES and isinstance(value, torch.Tensor) and not value.is_nested:
        yield path, value
    container = opened(value) if role.kind is Kind.INSIDE else None
    if container is not None:
        parts = zip(container.keys, container.values, role.inside, strict=True)
        for key, inner, inner_role in parts:
            yield from _sample_parts(inner, inner_role, path + key)
