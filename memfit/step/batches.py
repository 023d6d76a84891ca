"""A batch of any nesting, seen along its leading dimension.

It finds how many samples a batch holds, cuts it, makes one of another size from it, and puts it on
a device. Tensors may sit in tuples, lists, dictionaries and whatever else is registered with
`torch.utils._pytree`. What a batch means (which parts are inputs) is decided in
`memfit.step.workload`.
"""

from __future__ import annotations

from typing import Any

import torch

from memfit._torch_private import pytree
from memfit.errors import WorkloadError

__all__ = ["batch_size_of", "reordered", "resized", "take", "to_device"]


def batch_size_of(batch: Any) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting. Tensors without dimensions, and
            leaves that are no tensors, belong to the batch as a whole.

    Returns:
        The length of the leading dimension that all tensors share.

    Raises:
        WorkloadError: No tensor has a leading dimension, or they differ.
    """
    leading: dict[int, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            leading.setdefault(leaf.shape[0], f"batch{pytree.keystr(path)}")
    if not leading:
        raise WorkloadError(
            "The batch holds no tensor with a leading dimension, so it has no batch size; give "
            "tensors of shape (samples, ...) or a function of the batch size."
        )
    if len(leading) > 1:
        seen = " and ".join(f"{where} has {size}" for size, where in list(leading.items())[:2])
        raise WorkloadError(
            f"The batch's leading dimensions differ: {seen}; give a function of the batch size if "
            "some tensors are not per sample."
        )
    size = next(iter(leading))
    if size < 1:
        raise WorkloadError("The example batch is empty: its leading dimension is 0.")
    return size


def resized(batch: Any, batch_size: int) -> Any:
    """Return a batch of another size, its samples those of `batch` over and over.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        batch_size: Samples wanted, at least 1.

    Returns:
        The same nesting with new tensors of shape (batch_size, ...); other leaves as they are.

    Raises:
        WorkloadError: As `batch_size_of`.
    """
    size = batch_size_of(batch)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        if batch_size <= size:
            return leaf[:batch_size].clone(memory_format=torch.preserve_format)
        rows = torch.arange(batch_size, device=leaf.device) % size
        return leaf.index_select(0, rows)

    return pytree.tree_map(resize, batch)


def take(batch: Any, start: int, stop: int) -> Any:
    """Return the samples from `start` up to and without `stop`, as views.

    Args:
        batch: Tensors of shape (samples, ...) in any nesting.
        start: The first sample.
        stop: The sample after the last.

    Returns:
        The same nesting with tensors of shape (stop - start, ...); other leaves as they are.
    """

    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, torch.Tensor) and leaf.ndim > 0 else leaf

    return pytree.tree_map(cut, batch)


def reordered(batch: Any, order: torch.Tensor) -> Any:
    """Return the samples in another order.

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

    return pytree.tree_map(reorder, batch)


def to_device(
    batch: Any,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Any:
    """Return a batch with its tensors on a device.

    Args:
        batch: Tensors in any nesting.
        device: Where they shall be.
        dtype: What floating-point tensors become; `None` leaves them.
        memory_format: What tensors of shape (N, C, H, W) are laid out in; `None` leaves them.

    Copies from pinned memory to a GPU do not make the host wait.

    Returns:
        The same nesting; tensors that are as wanted already are not copied.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        wanted = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
        # Towards a GPU the stream keeps the order; to the host a copy has to be complete.
        moved = leaf.to(device, wanted, non_blocking=device.type == "cuda")
        if memory_format is not None and moved.ndim == 4:  # noqa: PLR2004 - (N, C, H, W)
            moved = moved.contiguous(memory_format=memory_format)
        return moved

    return pytree.tree_map(move, batch)
