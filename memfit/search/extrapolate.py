"""What the bytes of trials say of a larger batch: lines through them, and where those end.

Pure arithmetic over (batch size, peak bytes). Which batch size to try is `memfit.search.largest`'s.
"""

from __future__ import annotations

from memfit.records import Trial

__all__ = ["clean_points", "edge", "least_edge", "safe_edge"]


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
