"""Handles one part of a batch that holds samples along a dimension: counts, cuts and copies it.

A part is a tensor of any layout (also nested, jagged or sparse), a packed sequence or a NumPy
array.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

__all__ = ["copied", "is_array", "is_number", "is_part", "narrowed", "num_along", "picked"]


def is_array(value: object) -> bool:
    """Whether a value is a NumPy array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_number(value: object) -> bool:
    """Whether a value is a NumPy number."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def is_part(value: object) -> bool:
    """Whether a value can hold samples along a dimension."""
    return isinstance(value, (torch.Tensor, PackedSequence)) or is_array(value)


def num_along(value: Any, dim: int = 0) -> int | None:
    """Return the number of entries that a part has along a dimension.

    Args:
        value: A tensor, an array or a packed sequence.
        dim: The dimension, from 0.

    Returns:
        The number; `None` if the part has no such dimension.
    """
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) if dim == 0 else None
    if value.ndim <= dim:
        return None
    if isinstance(value, torch.Tensor) and value.is_nested:
        return int(value.size(0)) if dim == 0 else None
    return int(value.shape[dim])


def narrowed(value: Any, dim: int, start: int, stop: int) -> Any:
    """Return the entries from `start` up to, but not including, `stop` along a dimension.

    Args:
        value: A tensor, an array or a packed sequence.
        dim: The dimension, from 0.
        start: The first entry.
        stop: The entry after the last.

    Returns:
        A view if possible, else a copy.
    """
    if is_array(value):
        return value[(slice(None),) * dim + (slice(start, stop),)]
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested:
        return value.narrow(dim, start, stop - start)
    return picked(value, dim, range(start, stop))


def picked(value: Any, dim: int, rows: Sequence[int]) -> Any:
    """Return a copy of some entries along a dimension.

    Args:
        value: A tensor, an array or a packed sequence.
        dim: The dimension, from 0.
        rows: The indices of the entries, in the order wanted.
    """
    if is_array(value):
        return value.take(list(rows), axis=dim)
    if isinstance(value, PackedSequence):
        return _picked_sequences(value, rows)
    if value.is_nested:
        samples = value.unbind()
        return torch.nested.as_nested_tensor([samples[row] for row in rows], layout=value.layout)
    index = torch.tensor(list(rows), device=value.device)
    if value.layout in (torch.strided, torch.sparse_coo):
        return value.index_select(dim, index)
    return value.to_sparse_coo().index_select(dim, index).to_sparse(layout=value.layout)


def _picked_sequences(packed: PackedSequence, rows: Sequence[int]) -> PackedSequence:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    picked_lengths = lengths[list(rows)]
    # Sequences that were packed as sorted may be picked in an order that is not.
    is_sorted = packed.sorted_indices is None and bool((picked_lengths.diff() <= 0).all())
    return pack_padded_sequence(
        padded[list(rows)], picked_lengths, batch_first=True, enforce_sorted=is_sorted
    )


def copied(value: Any) -> Any:
    """Return a copy of a part that shares no memory with it. Return any other value itself."""
    if is_array(value):
        return value.copy()
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.clone(), *value[1:])
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout is torch.strided and not value.is_nested:
        return value.clone(memory_format=torch.preserve_format)
    return value.clone()
