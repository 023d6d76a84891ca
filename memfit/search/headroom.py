"""The batch size to recommend: below the edge, without allocator retries, with room to spare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from memfit.errors import UsageError
from memfit.records import Trial
from memfit.search import extrapolate
from memfit.search.largest import Found, TrialFunction

__all__ = [
    "Recommended",
    "checked_headroom",
    "foreseen",
    "has_headroom",
    "larger",
    "leaves_much_more",
    "limit_of",
    "recommended",
]

# A recommendation is looked for to this part of itself.
_CLOSE = 22
# A recommendation that leaves this part of the capacity free, beyond the headroom, is looked at
# again.
_MUCH_MORE_FREE = 50
NUM_LOOKS = 10
"""How many larger batch sizes are looked at where a look costs little."""


def checked_headroom(headroom: object) -> float:
    """Return the share of the memory to keep free, if it is one.

    Args:
        headroom: What the user gave.

    Raises:
        UsageError: It is not a number from 0 to below 1.
    """
    if isinstance(headroom, (int, float)) and 0 <= headroom < 1:
        return headroom
    raise UsageError(
        f"The headroom must be at least 0 and below 1, not {headroom!r}{_as_share(headroom)}"
    )


def _as_share(headroom: object) -> str:
    """Return a question, if this is a percentage that would be a share."""
    number = headroom.removesuffix("%") if isinstance(headroom, str) else headroom
    try:
        share = float(str(number)) / 100
    except ValueError:
        return "."
    return f"; did you mean {share:g}?" if 0 < share < 1 else "."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recommended:
    """The batch size to train with.

    Args:
        batch_size: The batch size; `None` where none keeps the headroom.
        trials: Every trial that this took, beyond those already known.
    """

    batch_size: int | None
    trials: tuple[Trial, ...]


def recommended(
    trial: TrialFunction,
    found: Found,
    *,
    capacity_bytes: int,
    headroom: float = 0.05,
    multiple_of: int = 1,
    has_retries: bool = True,
    accepts_close: bool = False,
) -> Recommended:
    """Find the batch size to train with: below the edge, with some memory kept free.

    Args:
        trial: Tries a batch size.
        found: What `largest` found; its trials are used again.
        capacity_bytes: What the device has for this process.
        headroom: Share of the capacity to keep free, from 0 to below 1.
        multiple_of: What the batch size has to be a multiple of, at least 1.
        has_retries: Whether a device can fit a batch size with allocator retries. Where it cannot,
            a batch size between two that fitted is not tried again.
        accepts_close: Whether a batch size that was tried is good enough if the bytes allow hardly
            more. It saves a trial where a prediction chose that batch size.

    Returns:
        A batch size that fits without allocator retries within the capacity less the headroom, and
        the trials it took to know that.

    Raises:
        ValueError: `headroom` or `multiple_of` is out of range.
    """
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom must be at least 0 and below 1, not {headroom}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, not {multiple_of}")
    walk = _Walk(
        trial,
        found,
        limit_bytes=limit_of(capacity_bytes, headroom),
        headroom=headroom,
        multiple_of=multiple_of,
        has_retries=has_retries,
        accepts_close=accepts_close,
    )
    return Recommended(batch_size=walk.batch_size(), trials=tuple(walk.extra))


def larger(
    look: Callable[[int], Trial],
    kept: Trial,
    *,
    limit_bytes: int,
    multiple_of: int = 1,
    below: int | None = None,
    num_looks: int = NUM_LOOKS,
) -> int | None:
    """Look for a larger batch size that keeps the headroom too, where a look costs little.

    Reserved bytes do not grow evenly: blocks and workspaces fit together better at some batch sizes
    than at others. So a batch size can fit although smaller ones leave too little free.

    Args:
        look: Says what a batch size would take, as a simulation does.
        kept: A batch size that keeps the headroom.
        limit_bytes: The capacity less the headroom; see `limit_of`.
        multiple_of: What the batch size has to be a multiple of, at least 1.
        below: Only smaller batch sizes are looked at; `None` if there is no such limit.
        num_looks: How many batch sizes are looked at.

    Returns:
        The largest of the looked-at batch sizes that keeps the headroom; `None` if none does.
    """
    if not kept.peak_reserved_bytes:
        return None
    point = (kept.batch_size, kept.peak_reserved_bytes)
    most = extrapolate.least_edge(point, limit_bytes)
    if below is not None:
        most = min(most, below - 1)
    num_multiples = most // multiple_of - kept.batch_size // multiple_of
    unit = multiple_of
    if num_multiples > num_looks:
        # Where sizes are left out, odd ones are: kernels are made for even batches.
        unit = 2 * multiple_of
    step = unit * max(1, -(-num_multiples * multiple_of // (unit * num_looks)))
    for size in range(most // unit * unit, kept.batch_size, -step):
        if has_headroom(look(size), limit_bytes):
            return size
    return None


def foreseen(
    look: TrialFunction,
    edge: Trial,
    *,
    capacity_bytes: int,
    headroom: float = 0.05,
    multiple_of: int = 1,
    has_retries: bool = True,
    num_looks: int = NUM_LOOKS,
) -> int | None:
    """Find the batch size that will be recommended, where a look at one costs little.

    Args:
        look: Says what a batch size would take, as a simulation does.
        edge: What it says of the largest batch size that fits.
        capacity_bytes: What the device has for this process.
        headroom: Share of the capacity to keep free, from 0 to below 1.
        multiple_of: What the batch size has to be a multiple of, at least 1.
        has_retries: Whether the device can fit a batch size with allocator retries.
        num_looks: How many larger batch sizes are looked at.

    Returns:
        The batch size; `None` if none keeps the headroom.
    """
    size = recommended(
        look,
        Found(batch_size=edge.batch_size, proved=False, trials=(edge,)),
        capacity_bytes=capacity_bytes,
        headroom=headroom,
        multiple_of=multiple_of,
        has_retries=has_retries,
    ).batch_size
    if size is None:
        return None
    kept, limit_bytes = look(size), limit_of(capacity_bytes, headroom)
    if not leaves_much_more(kept, limit_bytes, capacity_bytes=capacity_bytes):
        return size
    above = larger(
        look,
        kept,
        limit_bytes=limit_bytes,
        multiple_of=multiple_of,
        below=edge.batch_size + 1,
        num_looks=num_looks,
    )
    return above or size


def leaves_much_more(kept: Trial, limit_bytes: int, *, capacity_bytes: int) -> bool:
    """Whether a recommendation leaves more free than the headroom, by so much that it counts.

    Args:
        kept: The trial of the recommended batch size.
        limit_bytes: The capacity less the headroom; see `limit_of`.
        capacity_bytes: The capacity.
    """
    peak = kept.peak_reserved_bytes
    return peak is not None and peak <= limit_bytes - capacity_bytes // _MUCH_MORE_FREE


class _Walk:
    """The way from the edge down to a batch size that keeps the headroom."""

    def __init__(
        self,
        trial: TrialFunction,
        found: Found,
        *,
        limit_bytes: int,
        headroom: float,
        multiple_of: int,
        has_retries: bool,
        accepts_close: bool,
    ) -> None:
        self._trial = trial
        self._accepts_close = accepts_close
        self._headroom = headroom
        self._edge = found.batch_size or 0
        self._known = list(found.trials)
        self._limit_bytes = limit_bytes
        self._multiple_of = multiple_of
        self._has_retries = has_retries
        self.extra: list[Trial] = []

    def batch_size(self) -> int | None:
        """Return the batch size to recommend; `None` where none keeps the headroom."""
        best, upper, failed, num_failed = self._best_known(), self._edge, self._least_retried(), 0
        if failed is not None:
            # A larger batch size needs retries too.
            upper = min(upper, failed - max(1, failed // 50))
            if best is None:
                upper = min(upper, self._below_retries(failed))
        while (upper := self._multiple(upper)) > 0:
            candidate = max(self._expected(upper), best or 0)
            most = min(upper, candidate) if self._accepts_close else upper
            is_enough = self._accepts_close or failed is not None
            if best is not None and (best >= most or (is_enough and _is_close(best, most))):
                return best
            is_expected = num_failed == 0 and candidate < upper and self._has_beyond()
            if self._fits_well(candidate):
                if failed is None or is_expected:
                    return candidate
                if self._accepts_close and _is_close(candidate, self._expected(failed - 1)):
                    return candidate
                return self._between(candidate, failed)
            # Below the edge there can be a wide zone in which every batch size needs retries, so
            # each failure doubles the next step down.
            failed, num_failed = candidate, num_failed + 1
            upper = candidate - max(1, (candidate << num_failed) // 100)
            if self._least_retried() == candidate:
                upper = min(upper, self._below_retries(candidate))
        return best

    def _below_retries(self, retried: int) -> int:
        """Return the largest batch size that can keep the headroom below one that needs retries.

        What needs retries needs more than the capacity. Each sample adds at most its share of
        that, so the headroom is at least the same share of the samples.
        """
        return retried - max(1, math.ceil(retried * self._headroom))

    def _expected(self, upper: int) -> int:
        """Return where the bytes say that the headroom begins, `upper` at most."""
        points = extrapolate.clean_points(self._known)
        estimate = extrapolate.safe_edge(points, self._limit_bytes)
        candidate = upper if estimate is None else min(upper, estimate)
        # Below the first multiple there is nothing to try, so the first multiple is.
        return max(self._multiple(candidate), self._multiple_of)

    def _between(self, fits: int, fails: int) -> int:
        """Look between a batch size that fits and one that failed: a long step may go too far."""
        while not _is_close(fits, fails):
            middle = self._multiple((fits + fails) // 2)
            if middle == fits:
                break
            if self._fits_well(middle):
                fits = middle
            else:
                fails = middle
        return fits

    def _fits_well(self, batch_size: int) -> bool:
        tried = next((t for t in reversed(self._known) if t.batch_size == batch_size), None)
        if tried is None and not self._has_retries and _is_between(batch_size, self._known):
            return True
        if tried is None:
            tried = self._trial(batch_size)
            self._known.append(tried)
            self.extra.append(tried)
        return has_headroom(tried, self._limit_bytes)

    def _has_beyond(self) -> bool:
        """Whether bytes beyond the limit are known, so that a line to it lies between points."""
        points = extrapolate.clean_points(self._known)
        return any(num_bytes > self._limit_bytes for _, num_bytes in points)

    def _best_known(self) -> int | None:
        """Return the largest batch size that was seen to keep the headroom."""
        sizes = [t.batch_size for t in self._known if has_headroom(t, self._limit_bytes)]
        return max((size for size in sizes if size % self._multiple_of == 0), default=None)

    def _least_retried(self) -> int | None:
        """Return the smallest batch size that was seen to need allocator retries."""
        retried = (t for t in self._known if t.fits and t.num_alloc_retries)
        return min((t.batch_size for t in retried), default=None)

    def _multiple(self, batch_size: int) -> int:
        return batch_size // self._multiple_of * self._multiple_of


def _is_close(batch_size: int, other: int) -> bool:
    """Whether a larger batch size is not worth another trial."""
    return other - batch_size <= max(1, other // _CLOSE)


def limit_of(capacity_bytes: int, headroom: float) -> int:
    """Return the bytes of a capacity that are not to be kept free."""
    return int(capacity_bytes * (1 - headroom))


def has_headroom(trial: Trial, limit_bytes: int) -> bool:
    """Whether a batch size fits without allocator retries, within a limit.

    Args:
        trial: What was tried.
        limit_bytes: The capacity less the headroom; see `limit_of`.
    """
    peak = trial.peak_reserved_bytes
    return trial.fits and trial.num_alloc_retries == 0 and (peak is None or peak <= limit_bytes)


def _is_between(batch_size: int, trials: list[Trial]) -> bool:
    """Whether trials that fitted lie on both sides, and none that failed between them."""
    fits = [trial.batch_size for trial in trials if trial.fits]
    fails = [trial.batch_size for trial in trials if not trial.fits]
    return (
        any(size < batch_size for size in fits)
        and any(size > batch_size for size in fits)
        and all(size > batch_size for size in fails)
    )
