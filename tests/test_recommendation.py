"""The batch size that a simulation says to begin with."""

from __future__ import annotations

import dataclasses
from typing import Any

from memfit.backends import Prediction
from memfit.planning.searching import SearchOptions, _expected_recommendation, _improved
from memfit.records import Outcome, Source, Trial

CAPACITY_BYTES = 1000


@dataclasses.dataclass
class Uneven:
    """A simulated card on which every second batch size leaves holes between blocks."""

    has_retries: bool = True

    def trial(self, step: Any, batch_size: int) -> Trial:
        del step
        peak = 9 * batch_size + (100 if batch_size % 2 else 0)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if batch_size <= 130 else Outcome.OUT_OF_MEMORY,
            source=Source.SIMULATED,
            peak_reserved_bytes=min(peak, CAPACITY_BYTES),
            num_alloc_retries=int(peak > CAPACITY_BYTES),
        )


def prediction(edge: int) -> Prediction:
    scout: Any = Uneven()
    return Prediction(batch_size=edge, step=object(), scout=scout)  # type: ignore[arg-type]


def test_the_largest_size_within_the_headroom_is_expected() -> None:
    """A walk that met a size with holes stopped at 97 of 105, and left 11% in place of 5%."""
    size = _expected_recommendation(prediction(130), CAPACITY_BYTES, SearchOptions())
    assert size == 104


@dataclasses.dataclass
class Exact(Uneven):
    """The same card, on which each batch size takes a little more than the rough one says."""

    looked_at: list[int] = dataclasses.field(default_factory=list)

    def trial(self, step: Any, batch_size: int) -> Trial:
        self.looked_at.append(batch_size)
        rough = super().trial(step, batch_size)
        return dataclasses.replace(rough, peak_reserved_bytes=(rough.peak_reserved_bytes or 0) + 20)


def test_what_the_rough_simulation_finds_good_is_looked_at_exactly() -> None:
    """A device is not asked for 104, which leaves too little. Few sizes are looked at exactly."""
    exact = Exact()
    simulated: Any = exact
    both = dataclasses.replace(prediction(130), simulated=simulated)
    size = _expected_recommendation(both, CAPACITY_BYTES, SearchOptions())
    assert size == 102
    assert max(exact.looked_at) <= 104
    assert len(set(exact.looked_at)) <= 5


def test_a_recommendation_that_leaves_much_more_is_tried_once_more() -> None:
    """The size that the simulation names is tried, and it counts only if it keeps the headroom."""
    kept = Uneven().trial(None, 90)
    tried: list[int] = []

    def trial(batch_size: int) -> Trial:
        tried.append(batch_size)
        return Uneven().trial(None, batch_size)

    def improved(*trials: Trial) -> int | None:
        return _improved(
            trial,
            prediction(130),
            90,
            trials,
            capacity_bytes=CAPACITY_BYTES,
            options=SearchOptions(),
        )

    failed = Uneven().trial(None, 131)
    assert improved(kept, failed) == 104
    assert tried == [104]
    assert improved(kept, dataclasses.replace(failed, batch_size=91)) == 90
    assert tried == [104]
