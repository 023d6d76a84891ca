"""Cuts batches of any nesting, resizes them, and puts them on a device.

`memfit.step.layout` finds out where the samples are. `memfit.step.workload` decides which parts of
a batch are inputs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memfit.errors import WorkloadError
from memfit.step.batch_rules import BatchRules, entries_of
from memfit.step.layout import Kind, Role, Roles, roles_of
from memfit.step.leaves import copied, is_part, narrowed, num_along, picked
from memfit.step.nesting import map_leaves, opened

__all__ = [
    "BatchRules",
    "Layout",
    "batch_size_of",
    "counted",
    "private_copy",
    "reordered",
    "resized",
    "take",
    "to_device",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a batch is cut: which parts hold samples, and along which dimension.

    Args:
        rules: What the user says about the batch.
        num_samples: The number of samples in the batch that the layout was read from.
        roles: Where the samples are; `None` if the user's function cuts batches.
    """

    rules: BatchRules
    num_samples: int
    roles: Roles | None

    @classmethod
    def of(
        cls,
        batch: Any,
        rules: BatchRules | None = None,
        *,
        num_samples: int | None = None,
        other: tuple[Any, int] | None = None,
    ) -> Layout:
        """Find out how a batch is cut.

        Args:
            batch: A batch of any nesting.
            rules: What the user says about the batch.
            num_samples: The number of samples, if it is known.
            other: A similar batch with another known number of samples.

        Raises:
            WorkloadError: It cannot be told where the samples are, or there are none.
            UsageError: The rules name a part that the batch does not have.
        """
        rules = rules or BatchRules()
        if num_samples is None and rules.count is not None:
            num_samples = counted(rules.count, batch)
        if rules.cut is None:
            roles = roles_of(batch, rules, num_samples=num_samples, other=other)
            return cls(rules, roles.num_samples, roles)
        if num_samples is None:
            num_samples = _told_by_targets(batch, rules)
        return cls(rules, num_samples, None)

    def again(self, batch: Any) -> Layout:
        """Return how another batch is cut. If this layout fits the batch, it is used.

        Args:
            batch: A batch of any size, like the one that this layout was read from.

        Raises:
            WorkloadError: It cannot be told where the samples are, or there are none.
        """
        if self.roles is None or self.rules.count is not None:
            return Layout.of(batch, self.rules)
        sizes: set[int] = set()
        if self.roles.doubt is None and _measure(batch, self.roles.role, sizes) and len(sizes) == 1:
            (size,) = sizes
            if size > 0:
                return Layout(self.rules, size, dataclasses.replace(self.roles, num_samples=size))
        return Layout.of(batch, self.rules)

    def take(self, batch: Any, start: int, stop: int) -> Any:
        """Return the samples from `start` up to, but not including, `stop`. Use views if possible.

        Args:
            batch: The batch that this layout was read from, or one with the same nesting.
            start: The first sample.
            stop: The sample after the last.

        Raises:
            WorkloadError: It cannot be told which parts hold samples.
        """
        stop = min(stop, self.num_samples)
        if (start, stop) == (0, self.num_samples):
            return batch
        if self.roles is None:
            assert self.rules.cut is not None
            part = self.rules.cut(batch, start, stop)
            self._check_cut(part, stop - start)
            return part
        return _applied(
            batch,
            self._role(),
            lambda part, dim: narrowed(part, dim, start, stop),
            lambda entries: entries[start:stop],
        )

    def reordered(self, batch: Any, order: Sequence[int]) -> Any:
        """Return a copy of a batch with chosen samples in a chosen order.

        Args:
            batch: As in `take`.
            order: The indices of the samples. A sample may be repeated.

        Raises:
            WorkloadError: It cannot be told which parts hold samples, or a function cuts batches.
        """
        if self.roles is None:
            raise WorkloadError(
                "If a function cuts the batch, memfit cannot reorder the batch or make "
                "it larger. Give a function of the batch size."
            )
        return _applied(
            batch,
            self._role(),
            lambda part, dim: picked(part, dim, order),
            lambda entries: private_copy([entries[row] for row in order]),
        )

    def resized(self, batch: Any, batch_size: int) -> Any:
        """Return a batch of another size. The samples of the given batch are repeated.

        Args:
            batch: The batch that this layout was read from.
            batch_size: The number of samples wanted, at least 1.

        Returns:
            A batch with the same nesting. It shares no memory with the given batch.

        Raises:
            WorkloadError: As `reordered`.
        """
        if batch_size <= self.num_samples:
            return private_copy(self.take(batch, 0, batch_size))
        rows = [row % self.num_samples for row in range(batch_size)]
        return private_copy(self.reordered(batch, rows))

    def is_one_each(self, index: int) -> bool:
        """Whether an element of a flat batch is a list of one entry for each sample."""
        if self.roles is None or self.roles.role.kind is not Kind.INSIDE:
            return False
        inside = self.roles.role.inside
        return index < len(inside) and inside[index].kind is Kind.ENTRIES

    @property
    def is_doubted(self) -> bool:
        """Whether the batch could be cut in two ways."""
        return self.roles is not None and self.roles.doubt is not None

    def certain(self) -> None:
        """Refuse a batch that could be cut in two ways.

        Raises:
            WorkloadError: It cannot be told which parts hold samples.
        """
        if self.roles is not None and self.roles.doubt is not None:
            raise WorkloadError(self.roles.doubt)

    def _role(self) -> Role:
        self.certain()
        assert self.roles is not None
        return self.roles.role

    def _check_cut(self, part: Any, wanted: int) -> None:
        """Refuse a wrong result of the user's function, if its number of samples can be read."""
        count = self.rules.count
        if count is not None and counted(count, part) != wanted:
            raise WorkloadError(
                f"The function that cuts batches returned {counted(count, part)} samples when "
                f"asked for {wanted}."
            )


def counted(count: Callable[[Any], int], batch: Any) -> int:
    """Return the number of samples that a user's function counts in a batch.

    Raises:
        WorkloadError: The function did not return a number of samples.
    """
    seen = count(batch)
    try:
        number = int(seen)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise WorkloadError(
            f"The function that counts samples must return a whole number from 1, not {seen!r}."
        )
    return number


def _told_by_targets(batch: Any, rules: BatchRules) -> int:
    """Return the number of samples of a batch that a user's function cuts.

    Raises:
        WorkloadError: Neither the whole batch nor its targets have a single length.
    """
    said = [size for size, path in entries_of(batch, rules) if path in rules.by_path(batch)]
    if len(set(said)) == 1:
        return said[0]
    targets = batch[rules.num_inputs :] if isinstance(batch, (tuple, list)) else ()
    for seen in (batch, *((targets,) if targets else ())):
        with contextlib.suppress(WorkloadError):
            return roles_of(seen, BatchRules(num_inputs=rules.num_inputs)).num_samples
    raise WorkloadError(
        "memfit cannot tell how many samples the batch has. Give "
        "count=function as well as cut: a function that returns the number of "
        "samples in a batch."
    )


def _measure(value: Any, role: Role, sizes: set[int]) -> bool:
    """Collect the number of samples of each part. Return whether the batch has those parts."""
    if role.kind is Kind.SHARED:
        return True
    if role.kind is Kind.SAMPLES:
        num = num_along(value, role.dim) if is_part(value) else None
        if num is not None:
            sizes.add(num)
        return num is not None
    container = opened(value)
    if container is None:
        return False
    if role.kind is Kind.ENTRIES:
        sizes.add(len(container.values))
        return container.is_sequence
    return len(container.values) == len(role.inside) and all(
        _measure(inner, inner_role, sizes)
        for inner, inner_role in zip(container.values, role.inside, strict=True)
    )


def _applied(
    value: Any,
    role: Role,
    to_part: Callable[[Any, int], Any],
    to_entries: Callable[[Sequence[Any]], Sequence[Any]],
) -> Any:
    """Return the batch with a function applied to every part that holds samples."""
    if role.kind is Kind.SHARED:
        return value
    if role.kind is Kind.SAMPLES:
        return to_part(value, role.dim)
    container = opened(value)
    assert container is not None
    if role.kind is Kind.ENTRIES:
        return container.close(to_entries(container.values))
    inside = zip(container.values, role.inside, strict=True)
    return container.close([_applied(one, its, to_part, to_entries) for one, its in inside])


# --- trees of tensors, such as a model's outputs ----------------------------------------------


def batch_size_of(batch: Any) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: A batch of any nesting.

    Raises:
        WorkloadError: It cannot be told where the samples are, or there are none.
    """
    return Layout.of(batch).num_samples


def resized(batch: Any, batch_size: int) -> Any:
    """Return a batch of another size. The samples of `batch` are repeated.

    Args:
        batch: A batch of any nesting.
        batch_size: The number of samples wanted, at least 1.

    Raises:
        WorkloadError: It cannot be told where the samples are.
    """
    return Layout.of(batch).resized(batch, batch_size)


def take(batch: Any, start: int, stop: int) -> Any:
    """Return rows of tensors that all have samples in their first dimension, as views.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        start: The first sample.
        stop: The sample after the last.

    Returns:
        The same nesting, with tensors of shape (stop - start, ...). Other leaves are unchanged.
    """
    return map_leaves(
        lambda leaf: leaf[start:stop] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf,
        batch,
    )


def reordered(batch: Any, order: torch.Tensor) -> Any:
    """Return rows of tensors that all have samples in their first dimension, in another order.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        order: The index of the sample for each position: integers of shape (samples,).

    Returns:
        The same nesting, with new tensors. Other leaves are unchanged.
    """

    def reorder(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        return leaf.index_select(0, order.to(leaf.device))

    return map_leaves(reorder, batch)


def private_copy(batch: Any) -> Any:
    """Return a copy of a batch that shares no memory with it, except in the user's own objects."""
    return map_leaves(copied, batch)


def to_device(
    batch: Any,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    is_private: bool = False,
) -> Any:
    """Return a batch with its tensors on a device.

    Args:
        batch: A batch of any nesting. Objects with a method `to` (graphs, instances) are copied,
            and `to` of the copies is called.
        device: The device. Copies from pinned memory to a GPU do not make the host wait.
        dtype: The new type of floating-point tensors; `None` leaves it as it is.
        memory_format: The layout of tensors of shape (N, C, H, W); `None` leaves it as it is.
        is_private: Copy every tensor, so that a model that changes its inputs in place never
            changes the given batch.

    Returns:
        The same nesting. A tensor that already is as wanted is not copied, unless `is_private`.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return _moved_object(leaf, device)
        wanted = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
        # The stream orders copies to a GPU. A copy to the host must be complete when it returns.
        moved = leaf.to(device, wanted, non_blocking=device.type == "cuda")
        is_strided = moved.layout is torch.strided and not moved.is_nested
        if memory_format is not None and is_strided and moved.ndim == 4:  # noqa: PLR2004 - (N, C, H, W)
            moved = moved.contiguous(memory_format=memory_format)
        return moved

    def moved_privately(leaf: Any) -> Any:
        moved = move(leaf)
        return copied(moved) if moved is leaf or not isinstance(leaf, torch.Tensor) else moved

    return map_leaves(moved_privately if is_private else move, batch)


def _moved_object(leaf: Any, device: torch.device) -> Any:
    method = getattr(leaf, "to", None)
    if not callable(method) or isinstance(leaf, (type, torch.nn.Module)):
        return leaf
    # Some objects move in place and return themselves. A copy leaves the user's object unmoved.
    return copy.copy(leaf).to(device)
