"""A rehearsed step and a simulated one take the same bytes: a sample of the benchmark's table.

`benchmarks/against_rehearsal.py` compares more families and settings, operator by operator.
"""

from __future__ import annotations

from typing import Any

import pytest
from pinned import IS_PINNED

from memfit.api.cards import Cards
from memfit.api.steps import describe
from memfit.backends import with_precision
from memfit.backends.simulated import SimulatedBackend
from memfit.records import Engine
from memfit.simulation.cudnn.plans import missing_cudnn

pytestmark = [
    pytest.mark.rehearses,
    pytest.mark.skipif(
        missing_cudnn() is not None, reason=f"cuDNN cannot be asked: {missing_cudnn()}"
    ),
]

_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("regnetx_002", {"precision": "amp-fp16", "channels_last": True, "optimizer": "momentum"}),
    ("efficientvit_b0", {"precision": "amp-bf16", "optimizer": "adamw"}),
    ("test_resnet", {"precision": "fp32", "optimizer": "momentum"}),
    ("fasternet_t0", {"precision": "amp-bf16", "optimizer": "adamw"}),
    ("resnet10t", {"precision": "amp-bf16", "channels_last": True, "optimizer": "adamw"}),
    ("convnextv2_atto", {"precision": "amp-bf16", "optimizer": "adamw"}),
)


# One process rehearses all of them, because each start takes seconds.
def test_steps_take_the_same_bytes() -> None:
    """What tensors ask for is the same within 0.1%, and what is reserved is the same."""
    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        for model, options in _STEPS:
            step = describe(model, image_size=64, **options)
            trials = []
            for cards in (rehearsed, simulated):
                with cards.open("rtx3090", None, step) as card:
                    trials.append(card.trial(with_precision(step, card), 8))
            real, guessed = trials
            assert guessed.peak_requested_bytes == pytest.approx(
                real.peak_requested_bytes, rel=1e-3
            ), model
            assert guessed.peak_allocated_bytes == pytest.approx(
                real.peak_allocated_bytes, rel=1e-3 if IS_PINNED else 1e-2
            ), model
            assert guessed.peak_reserved_bytes == pytest.approx(
                real.peak_reserved_bytes, rel=1e-3 if IS_PINNED else 0.03
            ), model


def test_the_edge_is_the_rehearsed_edge() -> None:
    """Near the edge, where retries decide, both fit and fail at the same batch sizes.

    With another torch than the pinned one, the edge may be a sample away.
    """
    slack = 0 if IS_PINNED else 1
    step = describe("test_resnet", image_size=64, precision="amp-bf16", optimizer="adamw")
    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        with simulated.open("rtx3090", 2**30, step) as card:
            assert isinstance(card, SimulatedBackend)
            chosen = with_precision(step, card)
            edge = card.expected_edge(chosen)
            assert edge is not None
            sizes = (edge - slack, edge + 1 + slack)
            guessed = [card.trial(chosen, size) for size in sizes]
        with rehearsed.open("rtx3090", 2**30, step) as card:
            real = [card.trial(with_precision(step, card), size) for size in sizes]
    assert [trial.outcome for trial in guessed] == [trial.outcome for trial in real]
    assert bool(guessed[0].num_alloc_retries) == bool(real[0].num_alloc_retries)
    if IS_PINNED:
        assert guessed[0].num_alloc_retries == real[0].num_alloc_retries
        assert guessed[0].peak_reserved_bytes == real[0].peak_reserved_bytes
