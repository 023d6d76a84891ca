"""Explains a loss that is NaN because a micro-batch has no valid target.

A mean over valid targets is 0 / 0 if all targets of a micro-batch are ignored. With the weight
`"samples"` that micro-batch counts, and its NaN reaches every parameter. Only a loss that is not
finite is explained, and only by what the batch shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memfit.errors import WorkloadError
from memfit.step.nesting import opened

__all__ = ["check_counted"]

_IGNORED = (-100, 255, -1)
"""Source: torch's cross_entropy; segmentation data sets such as Cityscapes; fairseq and timm."""


def check_counted(loss: torch.Tensor, micro_batches: Sequence[Any], *, is_awaited: bool) -> None:
    """Refuse a step whose loss is NaN because a micro-batch has no valid target.

    Args:
        loss: The loss of the whole batch.
        micro_batches: Its micro-batches.
        is_awaited: The host waits for the device soon anyway, so that the loss may be read.

    Raises:
        WorkloadError: The loss is not finite, and a micro-batch has only ignored targets.
    """
    on_host = loss.device.type == "cpu"
    if not (on_host or is_awaited or any(map(_may_be_uncounted, micro_batches))):
        return
    if bool(torch.isfinite(loss)):
        return
    for index, micro_batch in enumerate(micro_batches):
        for path, part in _marks(micro_batch, "batch"):
            value = _only_value(part)
            if value is None:
                continue
            is_mask = part.dtype is torch.bool
            count = f"{path}.sum()" if is_mask else f"({path} != {value}).sum()"
            raise WorkloadError(
                f"Micro-batch {index + 1} of {len(micro_batches)} has no valid target ({path} is "
                f"{value} everywhere), so its mean loss is 0 / 0: give the Accumulator what the "
                f"loss averages over, such as weight=lambda batch: {count}."
            )


def _may_be_uncounted(micro_batch: Any) -> bool:
    """Whether a part marks no valid target, or is on a device, where reading it takes time."""
    return any(
        part.device.type != "cpu" or _only_value(part) is not None
        for _, part in _marks(micro_batch, "batch")
    )


def _marks(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the integer and boolean tensors of a batch, which may be targets or masks."""
    container = opened(value)
    if container is not None:
        for key, inner in zip(container.keys, container.values, strict=True):
            yield from _marks(inner, path + key)
    elif (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.numel()
        and not (value.is_floating_point() or value.is_complex() or value.is_nested)
    ):
        yield path, value


def _only_value(part: torch.Tensor) -> int | bool | None:
    """Return the value that marks targets as ignored, if the tensor has no other value."""
    first = part.flatten()[0]
    value = int(first)
    if part.dtype is torch.bool:
        return None if bool(part.any()) else False
    return value if value in _IGNORED and bool((part == first).all()) else None
