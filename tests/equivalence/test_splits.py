"""Tests of memfit.equivalence.splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.equivalence.splits import bounded, spans, splits_of, written

SIZES = st.integers(1, 64)
COUNTS = st.integers(2, 64)


@given(SIZES, COUNTS)
def test_every_cut_covers_the_effective_batch(size: int, count: int) -> None:
    """No sample is lost or counted twice."""
    for cut in splits_of(size, count):
        assert sum(cut) == size * count
        assert min(cut) >= 1


@given(st.integers(2, 64), COUNTS)
def test_the_uneven_cut_ends_short_and_keeps_to_the_micro_batch(size: int, count: int) -> None:
    """No part is larger than the micro-batch, so a device that fits it fits every part."""
    even, uneven = splits_of(size, count)
    assert max(uneven) <= size
    assert uneven[-1] < size
    assert uneven != even
    assert min(uneven) > 1 or size <= 2


@given(SIZES, COUNTS, st.integers(2, 100))
def test_a_bound_on_samples_is_kept(size: int, count: int, samples: int) -> None:
    """A cut has at most this many samples, and at least two micro-batches."""
    small, few = bounded(size, count, samples)
    assert small * few <= max(samples, 2)
    assert few >= 2
    assert (small, few) <= (size, count) or few <= count


@given(st.lists(st.integers(1, 9), min_size=1))
def test_spans_follow_each_other(cut: list[int]) -> None:
    """Each micro-batch begins where the one before ends."""
    found = list(spans(cut))
    assert [stop - start for start, stop in found] == cut
    assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]


@pytest.mark.parametrize(
    ("cut", "text"), [((8, 8, 8), "3 x 8"), ((12,), "12"), ((8, 6, 2), "8 + 6 + 2")]
)
def test_a_cut_is_written_for_people(cut: tuple[int, ...], text: str) -> None:
    """Even cuts are written as a count, uneven ones as a list."""
    assert written(cut) == text
