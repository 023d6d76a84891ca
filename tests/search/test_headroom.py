"""Tests of the look for a larger batch size that keeps the headroom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from memfit.records import Outcome, Source, Trial
from memfit.search import larger


@dataclasses.dataclass
class Device:
    """A made-up device with bytes by batch size, on which everything fits."""

    bytes_of: Callable[[int], int]
    tried: list[int] = dataclasses.field(default_factory=list)

    def trial(self, batch_size: int) -> Trial:
        self.tried.append(batch_size)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS,
            source=Source.SIMULATED,
            peak_reserved_bytes=self.bytes_of(batch_size),
        )


@given(st.lists(st.integers(-60, 60), min_size=7, max_size=7), st.sampled_from([1, 4]))
def test_a_larger_size_is_found_where_bytes_do_not_grow_evenly(
    uneven: list[int], multiple_of: int
) -> None:
    """It keeps the headroom, and the looks are few; where every size is looked at, it is best."""
    device = Device(lambda b: 10 * b + uneven[b % 7])
    kept = device.trial(100)
    device.tried.clear()
    found = larger(device.trial, kept, limit_bytes=1100, multiple_of=multiple_of, below=111)
    assert len(device.tried) <= 10
    candidates = [b for b in range(101, 111) if b % multiple_of == 0]
    reachable = [b for b in candidates if b * device.bytes_of(100) <= 1100 * 100]
    assert found == max((b for b in reachable if device.bytes_of(b) <= 1100), default=None)


def test_no_larger_size_is_looked_for_beyond_one_that_failed() -> None:
    """Sizes from `below` on are not looked at, and a size without bytes says nothing."""
    device = Device(lambda b: b)
    assert larger(device.trial, device.trial(100), limit_bytes=900, below=100) is None
    silent = dataclasses.replace(device.trial(100), peak_reserved_bytes=None)
    assert larger(device.trial, silent, limit_bytes=900) is None
