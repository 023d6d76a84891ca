"""Models built without random weights."""

from __future__ import annotations

import timm
import torch
from torch import nn

from memfit.step.unfilled import UnfilledWeights


def test_large_weights_are_not_drawn_and_nothing_else_changes() -> None:
    """Shapes, types and buffers are the model's; no random number is drawn."""
    plain = timm.create_model("test_vit", num_classes=10)
    before = torch.get_rng_state()
    with UnfilledWeights():
        nn.Linear(512, 512, bias=False)
        assert torch.equal(torch.get_rng_state(), before)
        unfilled = timm.create_model("test_vit", num_classes=10)
    pairs = zip(plain.named_parameters(), unfilled.named_parameters(), strict=True)
    for (name, ours), (other_name, theirs) in pairs:
        assert (name, ours.shape, ours.dtype) == (other_name, theirs.shape, theirs.dtype)
    for (name, ours), (_, theirs) in zip(
        plain.named_buffers(), unfilled.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_small_tensors_and_whole_numbers_are_filled() -> None:
    """Such tensors may be something other than weights."""
    with UnfilledWeights():
        assert torch.zeros(10).uniform_(1, 2).min() >= 1
        assert torch.zeros(2**15, dtype=torch.long).add_(3).min() == 3
