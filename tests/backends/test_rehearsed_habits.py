"""A rehearsed step and a simulated one hold the same for what a loop does besides."""

from __future__ import annotations

from typing import Any

import pytest

from memfit.api.cards import Cards
from memfit.api.steps import describe
from memfit.backends import with_precision
from memfit.records import Engine

pytestmark = pytest.mark.rehearses

_HABITS: tuple[dict[str, Any], ...] = (
    {"keeps_outputs": True},
    {"ema": True},
    {"prefetch": 3},
    {"fused": True},
    {"optimizer_in_backward": True},
)
_EVALUATIONS: tuple[dict[str, Any], ...] = (
    {"evaluate": True},
    {"evaluate": True, "no_grad": True},
    {"evaluate": "in-training", "ema": True},
)


# One process rehearses all of them, because each start takes seconds.
def test_habits_and_evaluations_take_the_same_bytes() -> None:
    """What an option adds is the same to the byte; so is an evaluation, within 0.5%."""

    def peaks(cards: Cards, **options: Any) -> int:
        step = describe("vit_tiny_patch16_224", image_size=96, precision="amp-bf16", **options)
        with cards.open("rtx3060", None, step) as card:
            found = card.trial(with_precision(step, card), 64).peak_requested_bytes
        assert found is not None
        return found

    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        bases = peaks(rehearsed), peaks(simulated)
        added = [
            (
                habit,
                *(
                    peaks(cards, **habit) - base
                    for cards, base in zip((rehearsed, simulated), bases, strict=True)
                ),
            )
            for habit in _HABITS
        ]
        assert [one for _, one, _ in added] == [other for _, _, other in added], added
        for options in _EVALUATIONS:
            one, other = peaks(rehearsed, **options), peaks(simulated, **options)
            assert other == pytest.approx(one, rel=0.005), options
