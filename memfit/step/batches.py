"""A batch of any nesting, seen along its samples.

It cuts batches, makes one of another size from an example, and puts them on a device. Where the
samples are is `memfit.step.layout`'s finding; what a batch means (which parts are inputs) is
decided in `memfit.step.workload`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from memfit.errors import DataEndedError, WorkloadError
from memfit.step.batch_rules import BatchRules, entries_of
from memfit.step.layout import Kind, Role, Roles, roles_of
from memfit.step.leaves import copied, is_part, narrowed, num_along, picked
from memfit.step.nesting import leaves_of, map_leaves, opened

__all__ = [
    "BatchRules",
    "Layout",
    "batch_size_of",
    "bytes_of",
    "check_made",
    "private_copy",
    "reordered",
    "resized",
    "take",
    "to_device",
]

_GROWS_FROM, _GROWS_TO = 1, 4


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a batch is cut: which of its parts hold samples, and where.

    Args:
        rules: What the user says.
        num_samples: Samples in the batch that it was read from.
        roles: Where they are; `None` where the user's function cuts.
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
            rules: What the user says.
            num_samples: How many samples there are, where that is known.
            other: A batch like it of another known number of samples.

        Raises:
            WorkloadError: It cannot be told, or there are no samples.
            UsageError: The rules are about parts that the batch has not.
        """
        rules = rules or BatchRules()
        if num_samples is None and rules.count is not None:
            num_samples = _counted(rules.count, batch)
        if rules.cut is None:
            roles = roles_of(batch, rules, num_samples=num_samples, other=other)
            return cls(rules, roles.num_samples, roles)
        if num_samples is None:
            num_samples = _told_by_targets(batch, rules)
        return cls(rules, num_samples, None)

    def again(self, batch: Any) -> Layout:
        """Return how another batch is cut, by what is known already where that fits.

        Args:
            batch: A batch like the one that this was read from, of any size.

        Raises:
            WorkloadError: It cannot be told, or there are no samples.
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
        """Return the samples from `start` up to and without `stop`, as views where there can be.

        Args:
            batch: The batch that this was read from, or one that is placed or nested as it is.
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
        """Return a batch of chosen samples in a chosen order, copied.

        Args:
            batch: As in `take`.
            order: Which samples, each any number of times.

        Raises:
            WorkloadError: It cannot be told which parts hold samples, or a function cuts them.
        """
        if self.roles is None:
            raise WorkloadError(
                "A batch that is cut by a function cannot be put into another order or made "
                "larger: give a function of the batch size."
            )
        return _applied(
            batch,
            self._role(),
            lambda part, dim: picked(part, dim, order),
            lambda entries: private_copy([entries[row] for row in order]),
        )

    def resized(self, batch: Any, batch_size: int) -> Any:
        """Return a batch of another size, its samples those of the batch over and over.

        Args:
            batch: The batch that this was read from.
            batch_size: Samples wanted, at least 1.

        Returns:
            The same nesting; nothing in it shares memory with the batch.

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
        """Whether it could be cut in two ways."""
        return self.roles is not None and self.roles.doubt is not None

    def certain(self) -> None:
        """Refuse to cut what could be cut in two ways.

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
        """Refuse what a user's function cut wrongly, where that can be seen."""
        count = self.rules.count
        if count is not None and _counted(count, part) != wanted:
            raise WorkloadError(
                f"The function that cuts batches returned {_counted(count, part)} samples when "
                f"asked for {wanted}."
            )


def _counted(count: Callable[[Any], int], batch: Any) -> int:
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
        WorkloadError: Neither the whole batch nor its targets say one number.
    """
    said = [size for size, path in entries_of(batch, rules) if path in rules.by_path(batch)]
    if len(set(said)) == 1:
        return said[0]
    targets = batch[rules.num_inputs :] if isinstance(batch, (tuple, list)) else ()
    for seen in (batch, *((targets,) if targets else ())):
        with contextlib.suppress(WorkloadError):
            return roles_of(seen, BatchRules(num_inputs=rules.num_inputs)).num_samples
    raise WorkloadError(
        "The batch does not say how many samples it has: give count=function beside cut, a "
        "function that returns the samples of a batch."
    )


def _measure(value: Any, role: Role, sizes: set[int]) -> bool:
    """Add what each part that holds samples has; say whether the batch has those parts at all."""
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
    """Return the batch with something done to every part that holds samples."""
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


def check_made(make: Callable[[int], Any], batch: Any, batch_size: int, rules: BatchRules) -> None:
    """Refuse what a function of the batch size returned, where it is of another size.

    Parts that are not per sample (the nodes of graphs, a mask) are the function's own business.

    Args:
        make: The user's function.
        batch: What it returned.
        batch_size: What it was asked for.
        rules: What the user says.

    Raises:
        WorkloadError: It is of another size, or nothing in it grows with the batch size.
    """
    if rules.count is not None:
        seen = _counted(rules.count, batch)
        if seen == batch_size:
            return
        raise _of_another_size(seen, batch_size)
    sizes = {size for size, _ in entries_of(batch, rules)}
    if batch_size in sizes:
        return
    try:
        seen = roles_of(batch, dataclasses.replace(rules, cut=None)).num_samples
    except WorkloadError as error:
        small, large = (bytes_of(make(size)) for size in (_GROWS_FROM, _GROWS_TO))
        if small < large:
            return
        raise WorkloadError(
            f"Nothing in what the batch function returned has {batch_size} samples, and it does "
            f"not grow with the batch size ({error})"
        ) from error
    raise _of_another_size(seen, batch_size)


def _of_another_size(seen: int, asked: int) -> WorkloadError:
    said = f"The batch function returned {seen} samples when asked for {asked}"
    if seen > asked:
        return WorkloadError(f"{said}.")
    return DataEndedError(
        f"{said}: where the data has no more, give max_batch_size={seen}, or repeat its samples.",
        num_samples=seen,
    )


def bytes_of(value: Any, depth: int = 2) -> int:
    """Return the bytes of tensors and arrays in a batch, and in the objects that it holds."""
    total = 0
    for leaf in leaves_of(value):
        if is_part(leaf):
            data = leaf.data if isinstance(leaf, PackedSequence) else leaf
            total += int(data.nbytes)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            total += bytes_of(list(vars(leaf).values()), depth - 1)
    return total


# --- trees of tensors, such as a model's outputs ----------------------------------------------


def batch_size_of(batch: Any) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: A batch of any nesting.

    Raises:
        WorkloadError: It cannot be told, or there are no samples.
    """
    return Layout.of(batch).num_samples


def resized(batch: Any, batch_size: int) -> Any:
    """Return a batch of another size, its samples those of `batch` over and over.

    Args:
        batch: A batch of any nesting.
        batch_size: Samples wanted, at least 1.

    Raises:
        WorkloadError: It cannot be told where its samples are.
    """
    return Layout.of(batch).resized(batch, batch_size)


def take(batch: Any, start: int, stop: int) -> Any:
    """Return rows of tensors that all have samples in their first dimension, as views.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        start: The first sample.
        stop: The sample after the last.

    Returns:
        The same nesting with tensors of shape (stop - start, ...); other leaves as they are.
    """
    return map_leaves(
        lambda leaf: leaf[start:stop] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf,
        batch,
    )


def reordered(batch: Any, order: torch.Tensor) -> Any:
    """Return rows of tensors that all have samples in their first dimension, in another order.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        order: Which sample comes where: integers of shape (samples,).

    Returns:
        The same nesting with new tensors; other leaves as they are.
    """

    def reorder(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        return leaf.index_select(0, order.to(leaf.device))

    return map_leaves(reorder, batch)


def private_copy(batch: Any) -> Any:
    """Return a batch that shares no memory with the given one, objects of a user's own excepted."""
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
            and the copies are told to move.
        device: Where they shall be.
        dtype: What floating-point tensors become; `None` leaves them.
        memory_format: What tensors of shape (N, C, H, W) are laid out in; `None` leaves them.
        is_private: Copy also what is as wanted already, so that what a model changes in place is
            never the given batch.

    Copies from pinned memory to a GPU do not make the host wait.

    Returns:
        The same nesting; tensors that are as wanted already are not copied.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return _moved_object(leaf, device)
        wanted = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
        # Towards a GPU the stream keeps the order; to the host a copy has to be complete.
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
    # Some move themselves, and return themselves: the user's own stays where it is.
    return copy.copy(leaf).to(device)
