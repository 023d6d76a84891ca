"""What the bytes of trials say of a larger batch: lines through them, and where those end.

Pure arithmetic over (batch size, peak bytes). Which batch size to try is `memfit.search.largest`'s.
"""

from __future__ import annotations

import bisect
import math

from memfit.records import Trial
from memfit.units import MIB

__all__ = [
    "SAFE_SHARE",
    "clean_points",
    "edge",
    "further",
    "held_points",
    "least_edge",
    "least_flat_edge",
    "middle_of_steps",
    "most_edge",
    "safe_edge",
    "samples_in_a_block",
    "step_towards",
]

SAFE_SHARE = (9, 10)
"""The part of `least_edge` that is safe, even where memory comes in steps."""

# Without retries, bytes are the step's own up to the edge. A smaller second trial then gives a line
# that is as good, and takes less time.
_QUICK_SHARE = (3, 4)
# The allocator reserves blocks of up to 10 MiB in segments of so many bytes, so reserved bytes that
# are equal may hide as many. Source: c10/cuda/CUDACachingAllocator.cpp (kLargeBuffer).
_SEGMENT_BYTES = 20 * MIB
# Larger blocks are multiples of so many bytes (kRoundLarge).
_BLOCK_BYTES = 2 * MIB
# A step of the edge is at most about this part of the edge: a card has gibibytes, a step holds
# dozens of tensors that grow with the batch, and each grows by blocks of 2 MiB.
_STEPS_TO_EDGE = 32


def clean_points(trials: list[Trial]) -> list[tuple[int, int]]:
    """Return (batch size, peak bytes) of the trials whose peak is the step's own.

    A peak that was reached with allocator retries is the device's limit, not the step's need.
    """
    clean = {
        trial.batch_size: trial.peak_reserved_bytes
        for trial in trials
        if trial.fits and trial.num_alloc_retries == 0 and trial.peak_reserved_bytes
    }
    return sorted(clean.items())


def held_points(trials: list[Trial]) -> list[tuple[int, int]]:
    """Return (batch size, bytes that tensors hold at most), in order.

    Args:
        trials: Trials that fitted. Of a batch size that was tried twice, the later one counts.
    """
    held = {t.batch_size: t.peak_allocated_bytes for t in trials if t.peak_allocated_bytes}
    return sorted(held.items())


def edge(points: list[tuple[int, int]], limit_bytes: int) -> int | None:
    """Return the largest batch size within the limit, as two points extrapolate it.

    The second point is the largest at most four fifths of the first: points that are close together
    measure the noise, those far below measure another regime.
    """
    if len(points) < 2:  # noqa: PLR2004 - two points make a line
        return None
    # The point nearest to the limit says most about the bytes there.
    last_size, last_bytes = min(points, key=lambda point: (abs(limit_bytes - point[1]), -point[0]))
    others = [point for point in points if point[0] != last_size]
    below = [point for point in others if 5 * point[0] <= 4 * last_size]
    size, num_bytes = below[-1] if below else others[0]
    if (last_bytes - num_bytes) * (last_size - size) <= 0:
        return None
    return last_size + (limit_bytes - last_bytes) * (last_size - size) // (last_bytes - num_bytes)


def safe_edge(points: list[tuple[int, int]], limit_bytes: int) -> int | None:
    """Return the largest batch size within the limit, not trusting points that are close together.

    A search that was told where to look has only those; their differences are the allocator's
    rounding, and a line through the origin and one of them errs on the safe side.
    """
    if points and 5 * points[0][0] > 4 * points[-1][0]:
        return least_edge(min(points, key=lambda point: abs(limit_bytes - point[1])), limit_bytes)
    return edge(points, limit_bytes)


def least_edge(point: tuple[int, int], limit_bytes: int) -> int:
    """Return a batch size that fits for certain if bytes are affine and the fixed ones positive."""
    size, num_bytes = point
    return limit_bytes * size // num_bytes


def further(point: tuple[int, int], limit_bytes: int, *, has_retries: bool) -> int:
    """Return the batch size to try after the first one: twice as many, or more where that is safe.

    Args:
        point: The first one and its peak bytes.
        limit_bytes: The capacity.
        has_retries: Whether bytes near the edge can be those of a full device.
    """
    numerator, denominator = SAFE_SHARE if has_retries else _QUICK_SHARE
    return max(least_edge(point, limit_bytes) * numerator // denominator, 2 * point[0])


def least_flat_edge(points: list[tuple[int, int]], limit_bytes: int) -> int:
    """Return a batch size that fits if the bytes go on as between two points that show no slope.

    What the samples between the points need is less than a segment of the allocator.
    """
    (size, num_bytes), (last_size, last_bytes) = points[0], points[-1]
    hidden = _SEGMENT_BYTES + max(0, last_bytes - num_bytes)
    return last_size + (limit_bytes - last_bytes) * (last_size - size) // hidden


def most_edge(points: list[tuple[int, int]], limit_bytes: int) -> int | None:
    """Return the largest batch size for which tensors alone are within the limit.

    What tensors hold has no noise of segments, and it bends upwards only: behind the optimizer's
    step, or another peak that does not grow, the step's own comes forth. So the last two points
    count, even if they are close together.
    """
    if len(points) < 2:  # noqa: PLR2004 - two points make a line
        return None
    last_size, last_bytes = points[-1]
    below = [point for point in points if 16 * point[0] <= 15 * last_size]
    size, num_bytes = below[-1] if below else points[0]
    if last_bytes <= num_bytes:
        return None
    return last_size + (limit_bytes - last_bytes) * (last_size - size) // (last_bytes - num_bytes)


def step_towards(most: int, low: int) -> int:
    """Return the next batch size to try below the largest one for which tensors have room.

    Args:
        most: That batch size, as a line says.
        low: The largest that fits; at most `most - 2`.
    """
    if most > 2 * low:
        return math.isqrt(low * most)  # bytes that hardly grow yet say little of what is so far
    if 4 * most > 5 * low:
        return most * 19 // 20
    # The edge is not beyond, and hardly ever there: not every cached byte can be given back.
    return middle_of_steps(low, most + 1)


def middle_of_steps(low: int, high: int) -> int:
    """Return the batch size that halves what is possible between a fit and a failure.

    Tensors grow by blocks of 2 MiB, so the edge is where one of them is full. Bytes of a sample
    have powers of two as factors, so has that batch size. Each such factor of a batch size doubles
    its weight, up to the length of a likely step.

    Args:
        low: The largest batch size that fits.
        high: The smallest one that does not; at least `low + 2`.
    """
    num_doublings = max(high // _STEPS_TO_EDGE, 1).bit_length() - 1

    def weight_up_to(size: int) -> int:
        return size + sum((size >> k) << (k - 1) for k in range(1, num_doublings + 1))

    # Trying a batch size tells the edges below it from those from it on.
    half = (weight_up_to(low - 1) + weight_up_to(high - 1)) / 2
    tries = range(low + 1, high)
    index = bisect.bisect_left(tries, half, key=lambda size: weight_up_to(size - 1))
    near = tries[max(index - 1, 0) : index + 1]
    return min(near, key=lambda size: abs(weight_up_to(size - 1) - half))


def samples_in_a_block(points: list[tuple[int, int]]) -> int:
    """Return how many samples make reserved bytes grow by a block, so that fewer are noise."""
    (size, num_bytes), (last_size, last_bytes) = points[0], points[-1]
    return max(1, _BLOCK_BYTES * (last_size - size) // max(1, last_bytes - num_bytes))
