"""Checks that a user's function of the batch size returned a batch of the size asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.nn.utils.rnn import PackedSequence

from memfit.errors import DataEndedError, WorkloadError
from memfit.step.batch_rules import BatchRules, entries_of
from memfit.step.batches import counted
from memfit.step.layout import roles_of
from memfit.step.leaves import is_part
from memfit.step.nesting import leaves_of

__all__ = ["bytes_of", "check_made"]

_GROWS_FROM, _GROWS_TO = 1, 4


def check_made(make: Callable[[int], Any], batch: Any, batch_size: int, rules: BatchRules) -> None:
    """Refuse the batch of a user's function if it does not have the size that was asked for.

    Parts that do not hold samples (the nodes of graphs, a mask) are not checked.

    Args:
        make: The user's function.
        batch: The batch that it returned.
        batch_size: The batch size that it was asked for.
        rules: What the user says about the batch.

    Raises:
        WorkloadError: The batch has another size, or nothing in it grows with the batch size.
    """
    if rules.count is not None:
        seen = counted(rules.count, batch)
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
            f"No part of the batch that the function returned has {batch_size} "
            f"samples, and no part grows with the batch size ({error})"
        ) from error
    raise _of_another_size(seen, batch_size)


def _of_another_size(seen: int, asked: int) -> WorkloadError:
    said = f"The batch function returned {seen} samples when asked for {asked}"
    if seen > asked:
        return WorkloadError(f"{said}.")
    return DataEndedError(
        f"{said}. If the data has no more samples, give max_batch_size={seen}, "
        "or repeat the samples.",
        num_samples=seen,
    )


def bytes_of(value: Any, depth: int = 2) -> int:
    """Return the bytes of the tensors and arrays in a batch and in the objects that it holds."""
    total = 0
    for leaf in leaves_of(value):
        if is_part(leaf):
            data = leaf.data if isinstance(leaf, PackedSequence) else leaf
            total += int(data.nbytes)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            total += bytes_of(list(vars(leaf).values()), depth - 1)
    return total
