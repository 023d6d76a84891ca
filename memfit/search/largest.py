"""The largest batch size for which a trial fits.

The search calls a function that tries a batch size. It does not know what a trial is made of. It
reads the bytes that trials report, extrapolates to the edge, and closes in on it. Where the bytes
mislead or are missing, it doubles and bisects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from memfit.records import Trial
from memfit.search import extrapolate

__all__ = [
    "DEFAULT_CEILING",
    "Found",
    "TrialFunction",
    "find_largest",
]

DEFAULT_CEILING = 65_536
"""The largest batch size that is tried where no other limit was given."""

TrialFunction = Callable[[int], Trial]

# If the edge is further away than this factor, the search first tries a batch size short of it. It
# is near the one that will be recommended.
_NEAR = (5, 4)
_STOP_SHORT_SHARE = (19, 20)
# Without retries, a line through so many points is trusted up to the edge. Two points are enough if
# a hundredth of the way to the edge is at most one sample. In both cases the bytes to go must be
# at most so many times the bytes between the points: if the peak is in the optimizer's step, small
# batches need the same bytes, and their line says nothing.
_POINTS_TO_TRUST = 3
_LINE_ERROR = (1, 100)
_TRUSTED_GROWTH = 8
# Memory at tiny batches misleads, so two small trials are trusted up to this factor.
_MAX_GROWTH = 16
# So many outcomes in a row that contradict the bytes are no accident.
_MANY_SURPRISES = 2
# Surprises double the next step, up to this part of the batch size.
_SURPRISED_STEP = 16
# After a surprise, a line is taken to be off by this part of what lies between fit and failure.
_SURPRISED_SHARE = 32
# With so few batch sizes left between a fit and a failure, the largest goes first: after a failure,
# what had fitted is tried once more.
_FEW_LEFT = 3
# A hint is expected to be this close to the edge.
_HINT_ERROR = (1, 50)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    Args:
        batch_size: The largest batch size that fits; `None` where not even the floor does.
        proved: The next batch size was tried and ran out (the certificate); otherwise the search
            ended at its ceiling.
        trials: Every trial, in the order they ran.
    """

    batch_size: int | None
    proved: bool
    trials: tuple[Trial, ...]


def find_largest(
    trial: TrialFunction,
    *,
    capacity_bytes: int | None = None,
    hint: int | None = None,
    known: Sequence[Trial] = (),
    floor: int = 1,
    ceiling: int = DEFAULT_CEILING,
    has_retries: bool = True,
    starts_afresh: bool = False,
    stop_bytes: int | None = None,
) -> Found:
    """Find the largest batch size that fits.

    The answer b comes with its certificate: b fitted, and b + 1 was tried and ran out. If anything
    ran out after b had fitted, b is tried once more: it has to fit a device that has just failed.
    Trials that start afresh are not tried twice.
    Where fits are not monotone (b + 1 fails and b + 3 fits), b is one of the edges.

    Without a hint this takes at most 2 + 2 log2(b) trials, typically 5. That holds where more
    samples never need less memory, and where the reported bytes decide what fits or none are
    reported. With an exact hint it takes two: the sample beyond the hint, and the hint. With a hint
    within 2% it takes at most 6 where bytes are affine in the batch size.

    Args:
        trial: Tries a batch size.
        capacity_bytes: What `Trial.peak_reserved_bytes` is held against; without it, the search
            doubles and bisects.
        hint: Where the edge is expected, in samples.
        known: Trials that have run already; those out of the range are left out.
        floor: The smallest batch size of interest, at least 1.
        ceiling: The largest batch size of interest, at least `floor`.
        has_retries: Whether a device can fit a batch size with allocator retries. Where it cannot,
            bytes are the step's own up to the edge, and a line through them is trusted further.
        starts_afresh: Whether earlier trials cannot have changed the device that a trial finds, as
            where each is a process of its own.
        stop_bytes: Where the bytes show the edge from afar, a batch size that reserves so many is
            tried first; a recommendation then needs no trial of its own. `None` for 95% of the
            capacity.

    Returns:
        The batch size, whether it is proved, and the trials.

    Raises:
        ValueError: `floor` or `ceiling` is out of range.
    """
    if not 1 <= floor <= ceiling:
        raise ValueError(f"need 1 <= floor <= ceiling, not floor={floor} and ceiling={ceiling}")
    search = _Search(
        capacity_bytes=capacity_bytes,
        hint=hint,
        floor=floor,
        ceiling=ceiling,
        has_retries=has_retries,
        tries_again=has_retries and not starts_afresh,
        stop_bytes=stop_bytes,
    )
    for earlier in known:
        if floor <= earlier.batch_size <= ceiling:
            search.record(earlier)
    while (batch_size := search.next_batch_size()) is not None:
        search.record(trial(batch_size))
    return search.found()


class _Search:
    """What is known so far, and what to try next."""

    def __init__(
        self,
        *,
        capacity_bytes: int | None,
        hint: int | None,
        floor: int,
        ceiling: int,
        has_retries: bool,
        tries_again: bool,
        stop_bytes: int | None,
    ) -> None:
        self._stop_bytes = stop_bytes
        self._has_retries = has_retries
        self._tries_again = tries_again
        self._capacity_bytes = capacity_bytes
        self._hint = None if hint is None else min(max(hint, floor), ceiling)
        self._floor = floor
        self._ceiling = ceiling
        self._trials: list[Trial] = []
        self._fits: set[int] = set()
        self._fails: set[int] = set()
        # What the bytes expect of the trial that runs now, and how many outcomes in a row went
        # against them upwards and downwards. Each one doubles the next step that way.
        self._expects_fit: bool | None = None
        self._surprises_up = 0
        self._surprises_down = 0
        # Once a row of surprises has ended, the bytes say no more about what is left.
        self._is_misled = False

    def record(self, trial: Trial) -> None:
        """Take note of a trial; what failed once counts as failing."""
        self._trials.append(trial)
        if trial.fits and trial.batch_size not in self._fails:
            self._fits.add(trial.batch_size)
        else:
            self._fails.add(trial.batch_size)
            self._fits.discard(trial.batch_size)
        streak = max(self._surprises_up, self._surprises_down)
        self._surprises_up += 1
        self._surprises_down += 1
        if self._expects_fit is not False or not trial.fits:
            self._surprises_up = 0
        if self._expects_fit is not True or trial.fits:
            self._surprises_down = 0
        if streak >= _MANY_SURPRISES and self._surprises_up == self._surprises_down == 0:
            self._is_misled = True

    def found(self) -> Found:
        """Return the result of a search that has nothing left to try."""
        low = self._low
        return Found(
            batch_size=low,
            proved=low is not None and low + 1 in self._fails,
            trials=tuple(self._trials),
        )

    def next_batch_size(self) -> int | None:
        """Return the batch size to try next, or `None` when the search is over."""
        low, high = self._low, self._high
        self._expects_fit = None
        if self._hint is not None:
            # The sample beyond goes first: a batch size that fits after it has failed is proved.
            beyond = min(self._hint + 1, self._ceiling)
            tried = self._fits | self._fails
            if beyond not in tried:
                return beyond
            if beyond in self._fails and self._hint not in tried:
                return self._hint
            if low is not None and high is not None and (near := self._below_hint(low, high)):
                return near
        if low is None:
            return self._down(high)
        if low == self._ceiling or high == low + 1:
            return low if self._tries_again and self._failed_since(low) else None
        if high is None:
            return min(max(self._up(low), low + 1), self._ceiling)
        return self._between(low, high)

    @property
    def _low(self) -> int | None:
        return max(self._fits, default=None)

    @property
    def _high(self) -> int | None:
        low = self._low or 0
        return min((size for size in self._fails if size > low), default=None)

    def _failed_since(self, low: int) -> bool:
        """Whether anything ran out after `low` had fitted."""
        for trial in reversed(self._trials):
            if trial.batch_size == low:
                return False
            if not trial.fits:
                return True
        return False

    def _down(self, high: int | None) -> int | None:
        """Nothing has fitted yet."""
        if high is None:
            # Not 1: a batch norm after global pooling refuses a single sample.
            return min(max(2, self._floor), self._ceiling)
        if high == self._floor:
            return None
        numerator, denominator = _HINT_ERROR
        if high == self._hint:
            below = -(-high * denominator // (denominator + numerator))
        else:
            below = high - high // 8 if len(self._fails) == 2 else high // 2  # noqa: PLR2004
        return max(self._floor, min(below, high - 1))

    def _up(self, low: int) -> int:
        """Something fitted and nothing above it has failed."""
        points = self._clean_points()
        if self._capacity_bytes is None or not points:
            return self._beyond_hint(low) or 2 * low
        edge = self._expected_edge(low)
        least = extrapolate.least_edge(points[-1], self._capacity_bytes)
        if edge is None and len(points) == 1:
            if low == self._hint and least * _NEAR[1] <= low * _NEAR[0]:
                return least
            # Beyond a hint that fitted, bytes that retries made say nothing: a step goes on.
            step = self._beyond_hint(low) if low != points[-1][0] else None
            if step is not None:
                return step
            beyond = extrapolate.further(
                points[-1], self._capacity_bytes, has_retries=self._has_retries
            )
            return max(beyond, 2 * low)
        if edge is None and self._hint is None:
            far = extrapolate.least_flat_edge(points, self._capacity_bytes)
            return max(min(far, _MAX_GROWTH * low), 2 * low)
        # Points that a hint has put close together may show no slope but noise.
        edge = least if edge is None else edge
        if edge > low + 1 and self._is_cramped(low):
            return extrapolate.step_towards(edge, low)
        if self._is_near(low, edge, points):
            # With retries, the sample beyond the edge goes first, so that the edge is proved after
            # a failure. Without, the edge goes first: lines err upwards, and a failure is cheaper.
            beyond = edge + 1 if self._has_retries or low >= edge else edge
            self._expects_fit = False if beyond > edge else None
            step = max(beyond - low, 1)
            return low + max(step, min(step << self._surprises_up, low // _SURPRISED_STEP))
        if not self._has_retries:
            reach = low + _TRUSTED_GROWTH // 2 * (low - points[0][0])
            return max(min(edge // 2, reach), 2 * low)
        numerator, denominator = _STOP_SHORT_SHARE
        stop_bytes = self._stop_bytes or self._capacity_bytes * numerator // denominator
        short = extrapolate.edge(points, stop_bytes)
        if short is None or 2 * short < low + edge:
            short = edge * numerator // denominator
        return min(short, max(_MAX_GROWTH * low, least))

    def _below_hint(self, low: int, high: int) -> int | None:
        """Return the next step down from a hint that failed, near which the edge is expected."""
        numerator, denominator = _HINT_ERROR
        assert self._hint is not None
        if self._hint not in self._fails or high > self._hint:
            return None
        step = max(1, 2 * (self._hint - high))
        below = self._hint - step
        # What fits near the hint says more than a step does.
        is_far = (self._hint - low) * denominator > 2 * self._hint * numerator
        return below if is_far and step * denominator <= self._hint * numerator else None

    def _beyond_hint(self, low: int) -> int | None:
        """Return the next step beyond a hint that fitted; the bytes are those of a full device."""
        numerator, denominator = _HINT_ERROR
        if self._hint is None or self._capacity_bytes is None:
            return None
        if low > self._hint * denominator // (denominator - numerator) + 1:
            return None
        self._expects_fit = False
        return low + min(1 << self._surprises_up, max(1, low // _SURPRISED_STEP))

    def _is_near(self, low: int, edge: int, points: list[tuple[int, int]]) -> bool:
        """Whether the bytes can be believed from `low` up to where they say the edge is."""
        if edge * _NEAR[1] <= low * _NEAR[0]:
            return True
        if self._has_retries or self._capacity_bytes is None:
            return False
        seen = points[-1][1] - points[0][1]
        if self._capacity_bytes - points[-1][1] > _TRUSTED_GROWTH * seen:
            return False
        numerator, denominator = _LINE_ERROR
        is_short = (edge - low) * numerator <= denominator
        return len(points) >= _POINTS_TO_TRUST or is_short

    def _between(self, low: int, high: int) -> int:
        """`low` fitted, `high` failed, and they are not neighbours."""
        points = self._clean_points()
        # After a failure far above, halve the ratio and not the distance. No edge is expected below
        # the batch size that the bytes have room for.
        least = low if self._is_misled else self._least()
        bottom = least if low < least < high - 1 else low
        middle = math.isqrt(bottom * high) if high > 4 * bottom else (bottom + high) // 2
        edge = self._expected_edge(low)
        if self._is_cramped(low):
            return self._halved(low, high, middle=middle, most=edge)
        if self._is_misled:
            return self._halved(low, high, middle=middle, most=None)
        if edge is None:
            if self._capacity_bytes is None or len(points) != 1:
                return middle
            least_edge = extrapolate.least_edge(points[0], self._capacity_bytes)
            # Where what fits is tried again after a failure, the failure goes first.
            guess = max(least_edge + 1 if self._has_retries else least_edge, low + 1)
            if self._hint is not None and self._has_retries and high - low <= _FEW_LEFT:
                return high - 1
        elif edge * _NEAR[1] > high * _NEAR[0]:
            return middle  # something that the bytes do not show decides here
        elif edge >= high - 1:
            guess = high - self._step_down(edge, low, high, points)
        else:
            beyond = edge + 1 if self._has_retries or low >= edge else edge
            guess = low + ((beyond - low) << self._surprises_up)
        if not (low < guess < high and self._affordable(guess, low, high)):
            return middle
        at_edge = not self._has_retries and guess == edge
        self._expects_fit = None if edge is None or at_edge else guess <= edge
        return guess

    def _halved(self, low: int, high: int, *, middle: int, most: int | None) -> int:
        """Halve what is possible, where blocks of 2 MiB decide: up to `most`, if that is known."""
        if not (self._has_retries and self._clean_points()):
            return middle
        if self._tries_again and high - low <= _FEW_LEFT:
            return high - 1
        if most is not None and most <= low + 1:
            self._expects_fit = False
            return min(low + (1 << self._surprises_up), middle)
        top = high if most is None else min(high, most + 1)
        split = extrapolate.middle_of_steps(low, top) if top <= 4 * low else middle
        return split if self._affordable(split, low, high) else middle

    def _step_down(self, edge: int, low: int, high: int, points: list[tuple[int, int]]) -> int:
        """Return how far below `high` to go, which failed although a line says that it fits."""
        # The line is off by at least what is beyond the failure, so as much goes down.
        step = max(1, edge - high + 2)
        if self._surprises_down:
            grain = max(extrapolate.samples_in_a_block(points), (high - low) // _SURPRISED_SHARE)
            step = max(step, grain << (self._surprises_down - 1))
        return step

    def _affordable(self, guess: int, low: int, high: int) -> bool:
        """Whether bisection from `guess` would still keep to the promised number of trials."""
        used = len(self._trials) + 1
        least = self._least()

        def keeps(new_low: int, new_high: int) -> bool:
            retry = 1 if self._tries_again else 0
            bisections = math.ceil(math.log2(new_high - new_low))
            return used + bisections + retry <= 2 + 2 * math.log2(max(new_low, least, 2))

        if keeps(low, guess) and keeps(guess, high):
            return True
        # If bisection cannot keep the promise either, a guess near by costs nothing.
        middle = (low + high) // 2
        return high <= 4 * low and not (keeps(low, middle) and keeps(middle, high))

    def _least(self) -> int:
        """Return the least answer that is expected: bytes only grow with the samples."""
        points = self._clean_points()
        if not points:
            return 0
        numerator, denominator = extrapolate.SAFE_SHARE
        return (
            extrapolate.least_edge(points[-1], self._capacity_bytes or 0) * numerator // denominator
        )

    def _clean_points(self) -> list[tuple[int, int]]:
        return extrapolate.clean_points(self._fitted())

    def _fitted(self) -> list[Trial]:
        return [trial for trial in self._trials if trial.batch_size in self._fits]

    def _is_cramped(self, low: int) -> bool:
        """Whether reserved bytes say no more, where an allocator gives back its cache."""
        return self._has_retries and self._is_beyond(low, self._clean_edge())

    def _is_beyond(self, low: int, edge: int | None) -> bool:
        """Whether `low` needs retries, or is beyond the edge that the bytes without them show."""
        retried = (t for t in self._trials if t.batch_size == low and t.fits)
        return (edge is not None and edge < low) or any(t.num_alloc_retries for t in retried)

    def _clean_edge(self) -> int | None:
        if self._capacity_bytes is None:
            return None
        return extrapolate.edge(self._clean_points(), self._capacity_bytes)

    def _expected_edge(self, low: int) -> int | None:
        """Return where the bytes say the edge is: `low` at least, perhaps beyond the ceiling."""
        if self._capacity_bytes is None:
            return None
        edge = self._clean_edge()
        if self._is_beyond(low, edge):
            # It fits beyond what was reserved before: the allocator has begun to give back its
            # cache and ask again, and what tensors hold decides.
            held = extrapolate.held_points(self._fitted())
            most = extrapolate.most_edge(held, self._capacity_bytes)
            edge = max(most, low) if most is not None else edge and max(edge, low)
        if edge is not None and self._hint is not None:
            # A line through points that a hint has put close together reaches no further than the
            # hint is to be believed.
            numerator, denominator = _HINT_ERROR
            most = self._hint * denominator // (denominator - numerator) + 1
            edge = min(edge, most) if low < most else edge
        return edge
