"""What a process can use of a card that is not there."""

from __future__ import annotations

from memfit.backends.card_capacity import card_capacity
from memfit.backends.simulated import SimulatedBackend
from memfit.cards import find_gpu
from memfit.planning import SearchOptions
from memfit.planning.searching import run_search
from memfit.records import Precision, Source, StepOptions
from memfit.search import has_headroom, limit_of
from memfit.step.training_step import TrainingStep
from memfit.units import MIB


def test_an_estimated_process_is_shown_with_its_range() -> None:
    """The range of similar cards is in the words, and the cautious end is its most."""
    card = find_gpu("h800")
    capacity = card_capacity(card, Source.REHEARSED)
    told = "less about 600 MiB for the process itself, 520 MiB to 764 MiB on similar cards"
    assert capacity.origin.endswith(told)
    assert capacity.origin.startswith("rehearsed: ")
    assert capacity.safe_bytes == card.total_bytes - 764 * MIB
    assert capacity.usable_bytes == card.total_bytes - 600 * MIB


def test_a_measured_process_has_no_range() -> None:
    """Where the card itself was measured, a recommendation counts on what is usable."""
    capacity = card_capacity(find_gpu("rtx4090"), Source.SIMULATED)
    assert "less 489 MiB for the process itself" in capacity.origin
    assert capacity.cautious_bytes is None
    # None of AMD's cards was measured.
    unknown = card_capacity(find_gpu("mi300x"), Source.SIMULATED)
    assert unknown.origin.endswith("less about 450 MiB for the process itself")
    assert capacity.safe_bytes == capacity.usable_bytes


def test_a_recommendation_counts_on_the_cautious_end() -> None:
    """The headroom of a recommendation is kept even if the process holds the most that was seen."""
    card = find_gpu("any", total_bytes=2000 * MIB)
    options = StepOptions(precision=Precision.AMP_BF16)
    step = TrainingStep(subject="test_vit", options=options)
    with SimulatedBackend(card) as backend:
        result = run_search(backend, step, SearchOptions(headroom=0.0))
        found = result.recommended_batch_size
        assert found is not None
        safe_bytes = limit_of(result.capacity.safe_bytes, 0.0)
        assert has_headroom(backend.trial(step, found), safe_bytes)
        assert not has_headroom(backend.trial(step, result.max_batch_size), safe_bytes)
        assert result.max_batch_size > found
