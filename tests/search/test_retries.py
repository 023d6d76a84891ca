"""Tests of the search where an allocator gives back its cache near the edge, and retries.

The made-up allocator rounds blocks to 2 MiB as PyTorch's does. Its cache can be given back, so
reserved bytes stop to grow at the capacity, long before the edge.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.records import Outcome, Source, Trial
from memfit.search import Found, extrapolate, find_largest, recommended
from memfit.units import MIB

CAPACITY = 1883 * MIB


@dataclasses.dataclass
class Caching:
    """A device on which a step holds some tensors of each sample.

    Args:
        fixed_bytes: What does not grow with the batch.
        other_peak_bytes: What another part of the step takes beside them, such as the optimizer's.
        tensor_bytes: The bytes of a sample in each tensor.
        cached_share: Cached bytes, as a share of the tensors' blocks, while there is room.
        stuck_share: Those that cannot be given back.
    """

    fixed_bytes: int
    other_peak_bytes: int
    tensor_bytes: tuple[int, ...]
    cached_share: float
    stuck_share: float
    tried: list[int] = dataclasses.field(default_factory=list)

    def _grown(self, batch_size: int, *, share: float = 0.0, block: int = 2 * MIB) -> int:
        blocks = sum(-(-size * batch_size // block) * block for size in self.tensor_bytes)
        return self.fixed_bytes + max(self.other_peak_bytes, int(blocks * (1 + share)))

    def trial(self, batch_size: int) -> Trial:
        self.tried.append(batch_size)
        reserved = self._grown(batch_size, share=self.cached_share)
        fits = self.fits(batch_size)
        held = self._grown(batch_size, block=512)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            source=Source.REHEARSED,
            peak_allocated_bytes=min(held, CAPACITY),
            peak_reserved_bytes=min(reserved, CAPACITY - batch_size % 7 * MIB),
            num_alloc_retries=int(reserved > CAPACITY),
        )

    def fits(self, batch_size: int) -> bool:
        return self._grown(batch_size, share=self.stuck_share) <= CAPACITY

    def edge(self) -> int:
        low, high = 0, 2**21
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def largest(self) -> Found:
        return find_largest(self.trial, capacity_bytes=CAPACITY, ceiling=2**20, starts_afresh=True)


MLP = Caching(130 * MIB, 30 * MIB, (4096,) * 11, 0.09, 0.035)
WIDE_MLP = Caching(960 * MIB, 320 * MIB, (16384,) * 7, 0.34, 0.16)
CONVOLUTIONS = Caching(
    130 * MIB, 80 * MIB, (401408,) * 4 + (200704,) * 8 + (100352,) * 4, 0.4, 0.02
)


@pytest.mark.parametrize(
    ("device", "edge", "most"), [(MLP, 38912, 13), (WIDE_MLP, 7168, 14), (CONVOLUTIONS, 491, 11)]
)
def test_an_edge_behind_retries_is_proved_in_few_trials(
    device: Caching, edge: int, most: int
) -> None:
    """Lines through reserved bytes alone took 26, 28 and 15 trials."""
    device = dataclasses.replace(device, tried=[])
    found = device.largest()
    assert (found.batch_size, found.proved) == (edge, True)
    assert len(found.trials) <= most
    limit = int(CAPACITY * 0.95)
    answer = recommended(device.trial, found, capacity_bytes=CAPACITY, accepts_close=True)
    best = device.trial(answer.batch_size or 0)
    assert best.num_alloc_retries == 0
    assert 0.93 * limit <= (best.peak_reserved_bytes or 0) <= limit
    assert len(answer.trials) <= 3


caching = st.builds(
    lambda fixed, other, tensors, share, stuck: Caching(
        fixed * MIB, other * MIB, tuple(tensors), share, share * stuck
    ),
    fixed=st.integers(10, 1200),
    other=st.integers(0, 600),
    tensors=st.lists(st.integers(2000, 3 * MIB), min_size=1, max_size=24),
    share=st.floats(0, 0.5),
    stuck=st.floats(0, 1),
)


@given(caching)
def test_an_edge_behind_retries_is_proved_and_nothing_is_tried_twice(device: Caching) -> None:
    """The certificate needs no order: a trial finds a device that a failure has not changed."""
    edge = device.edge()
    if edge == 0:
        assert device.largest().batch_size is None
        return
    found = device.largest()
    assert (found.batch_size, found.proved) == (edge, True)
    assert len(set(device.tried)) == len(device.tried) <= 5 + 2 * math.log2(edge + 1)


def test_a_line_that_retries_have_refuted_is_left() -> None:
    """A fit with retries is beyond the edge of reserved bytes, whatever their line says."""
    edge, tried = 4000, []

    def trial(batch_size: int) -> Trial:
        tried.append(batch_size)
        # Up to 2400 samples the reserved bytes hardly grow, then the cache fills up.
        reserved = 1000 + batch_size // 20 if batch_size < 2400 else 2000
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if batch_size <= edge else Outcome.OUT_OF_MEMORY,
            source=Source.REHEARSED,
            peak_allocated_bytes=min(600 + batch_size * 1400 // edge, 2000),
            peak_reserved_bytes=reserved,
            num_alloc_retries=int(batch_size >= 2400),
        )

    known = tuple(trial(size) for size in (256, 2324, 2817))
    tried.clear()
    found = find_largest(trial, capacity_bytes=2000, known=known, starts_afresh=True)
    assert (found.batch_size, found.proved) == (edge, True)
    assert max(tried) <= edge + 2
    assert len(tried) <= 8


def test_bytes_that_show_no_slope_lead_further_than_to_the_double() -> None:
    """What is hidden in a segment of the allocator is small beside what is free."""
    device = Caching(700 * MIB, 500 * MIB, (4096,), 0.1, 0.1)
    device.largest()
    assert device.tried[:4] == [2, 4, 64, 1024]


def test_a_line_that_is_far_off_is_left_at_once() -> None:
    """A failure short of the expected edge shows by how much the line errs at least."""
    device = Caching(1100 * MIB, 0, (30000,), 0.1, 0.0)
    low, high = device.trial(100), device.trial(30_000)
    bent = dataclasses.replace(low, batch_size=4000, peak_reserved_bytes=1150 * MIB)
    device.tried.clear()
    find_largest(
        device.trial,
        capacity_bytes=CAPACITY,
        known=(dataclasses.replace(low, peak_reserved_bytes=1140 * MIB), bent, high),
        starts_afresh=True,
    )
    assert device.tried[0] < 20_000


@given(st.integers(0, 10**6), st.integers(2, 10**6))
def test_a_split_is_between_and_halves_what_is_possible(low: int, distance: int) -> None:
    """No part is left with much more than half of the weight."""
    high = low + distance
    split = extrapolate.middle_of_steps(low, high)
    assert low < split < high
    if distance <= 1000:
        doublings = max(high // 32, 1).bit_length() - 1
        weights = {
            size: 2 ** min((size & -size).bit_length() - 1, doublings) if size else 0
            for size in range(low, high)
        }
        below = sum(weight for size, weight in weights.items() if size < split)
        heaviest = max(weights.values())
        assert abs(2 * below - sum(weights.values())) <= 2 * heaviest


def test_a_round_number_near_the_middle_is_the_likely_edge() -> None:
    """So it is tried as the one or with the one beyond it."""
    assert extrapolate.middle_of_steps(38910, 39050) in (38912, 38913)
    assert extrapolate.middle_of_steps(7787, 7814) in (7808, 7809)
    assert extrapolate.middle_of_steps(40, 50) == 45
