"""Chooses how a batch is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["bounded", "spans", "splits_of", "written"]


def splits_of(micro_batch_size: int, accumulation_steps: int) -> tuple[tuple[int, ...], ...]:
    """Return two ways of cutting an effective batch: evenly, and unevenly with a short last part.

    No part is larger than the micro-batch, unless the micro-batch is a single sample. No part is a
    single sample if that can be avoided.

    Args:
        micro_batch_size: Samples in each micro-batch.
        accumulation_steps: Micro-batches in the effective batch.

    Returns:
        The sizes of the micro-batches, evenly and unevenly. For two micro-batches of one sample,
        only the even cut.
    """
    size, count = micro_batch_size, accumulation_steps
    even = (size,) * count
    if size == 1:
        return (even,) if count == 2 else (even, (2, *even[2:]))  # noqa: PLR2004 - a pair
    if size == 3:  # noqa: PLR2004 - threes and twos: one sample is a special case
        return even, (*even[2:], 2, 2, 2)
    last = 1 if size < 4 else max(2, size // 3)  # noqa: PLR2004 - a short last one of 2 needs 4
    return even, (size, size - last, *even[2:], last)


def bounded(micro_batch_size: int, accumulation_steps: int, samples: int | None) -> tuple[int, int]:
    """Return a micro-batch size and a number of micro-batches with a limited sum of samples.

    Args:
        micro_batch_size: The requested number of samples in each micro-batch.
        accumulation_steps: The requested number of micro-batches.
        samples: The most samples in all; `None` for no limit.
    """
    if samples is None or micro_batch_size * accumulation_steps <= samples:
        return micro_batch_size, accumulation_steps
    # Fewer micro-batches are better than micro-batches of a single sample.
    count = min(accumulation_steps, max(2, samples // 4))
    return min(micro_batch_size, max(1, samples // count)), count


def spans(cut: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each micro-batch begins and ends."""
    start = 0
    for size in cut:
        yield start, start + size
        start += size


def written(cut: Sequence[int]) -> str:
    """Return a cut as text: `"4 x 8"`, or `"8 + 6 + 2"` if the parts differ."""
    if len(set(cut)) == 1:
        return str(cut[0]) if len(cut) == 1 else f"{len(cut)} x {cut[0]}"
    return " + ".join(str(size) for size in cut)
