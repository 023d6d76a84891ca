"""A rehearsed step and a simulated one hold the same for what a loop does besides."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest
import torch
from pinned import IS_PINNED
from torch import nn

import memfit
from memfit.api.cards import Cards
from memfit.api.steps import describe
from memfit.backends import with_precision
from memfit.records import Engine, Source
from memfit.step.training_step import TrainingStep
from memfit.units import MIB

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


# Older releases keep the workspaces of BLAS from one pass to the next.
KEPT_BYTES = 0 if IS_PINNED else 12 * MIB


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
            assert other == pytest.approx(one, rel=0.005, abs=KEPT_BYTES), options


class Chain(nn.Module):
    """Many small operations, each of which keeps its input unless it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1024))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return numbers of the shape of the inputs."""
        kept = inputs * self.scale
        for _ in range(8):
            kept = kept.sin() * 2
        return kept


# The compiler takes most of its time.
@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton compiles its launcher with cc")
def test_a_compiled_model_keeps_less() -> None:
    """What is fused is not kept for backward, and the figures say where they come from."""
    workload = memfit.Workload(
        Chain(), (torch.randn(2, 1024), torch.randn(2, 1024)), nn.functional.mse_loss, "sgd"
    )
    with Cards(Engine.REHEARSE) as cards, cards.open("rtx3060", None, describe(workload)) as card:
        plain, compiled = (
            card.trial(with_precision(describe(workload, compile=is_compiled), card), 4096)
            for is_compiled in (False, True)
        )
    assert compiled.source is Source.REHEARSED
    assert plain.peak_requested_bytes is not None
    assert compiled.peak_requested_bytes is not None
    assert compiled.peak_requested_bytes < plain.peak_requested_bytes / 2


@pytest.mark.needs("bitsandbytes")
def test_states_of_eight_bits_and_of_pages() -> None:
    """Adam's states take 2 bytes for each number in place of 8, and none on the card in pages."""

    class Wide(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2048, 2048, bias=False)

    workload = memfit.Workload(
        Wide(), (torch.randn(2, 2048), torch.randn(2, 2048)), nn.functional.mse_loss, "adamw"
    )
    names = ("adamw", "bnbadamw8bit", "bitsandbytes.AdamW8bit", "bitsandbytes.PagedAdamW8bit")
    with Cards(Engine.REHEARSE) as cards, cards.open("rtx3060", None, describe(workload)) as card:
        steps = [
            with_precision(describe(dataclasses.replace(workload, optimizer=name)), card)
            for name in names
        ]
        held = [card.call(held_by_state, step) for step in steps]
    num_weights = 2048 * 2048
    assert held[0] == pytest.approx(8 * num_weights, rel=0.01)
    assert held[1] == held[2] == pytest.approx(2 * num_weights, rel=0.05)
    assert held[3] < num_weights


def held_by_state(backend: Any, step: TrainingStep) -> int:
    """Return the bytes on the card that a first step leaves beside weights; runs on the card."""
    del backend
    prepared = step.prepare(torch.device("cuda"))
    prepared.begin()
    before = torch.cuda.memory_allocated()
    prepared.iterate(2)
    return torch.cuda.memory_allocated() - before
