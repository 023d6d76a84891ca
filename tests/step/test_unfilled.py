"""Models built without random weights."""

from __future__ import annotations

import pytest
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


def test_meta_tensors_are_returned_unfilled_and_others_are_filled() -> None:
    """A constant is a value too, so a meta tensor does not need it."""
    with UnfilledWeights():
        nothing = torch.empty(2**15, device="meta")
        assert nothing.zero_() is nothing.fill_(3) is nothing
        assert torch.empty(2**15).fill_(3).eq(3).all()
        assert torch.ones(2**15).zero_().eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_is_moved_to_a_card_without_a_copy_of_its_large_weights(
    dtype: torch.dtype | None,
) -> None:
    """It takes the same bytes there, and what may be more than weights has its values."""
    linear, norm = nn.Linear(512, 512), nn.BatchNorm1d(512)
    model = nn.Sequential(linear, norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    before = torch.cuda.memory_allocated()
    with UnfilledWeights():
        model.to(device="cuda", dtype=dtype)
    taken = torch.cuda.memory_allocated() - before
    assert {value.device.type for value in model.state_dict().values()} == {"cuda"}
    assert linear.weight.dtype == (dtype or torch.float32)
    assert linear.weight.is_leaf
    assert linear.weight.requires_grad
    assert linear.bias.cpu().eq(3).all()
    assert norm.running_var is not None
    assert norm.running_var.cpu().eq(1).all()
    copied = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512))
    before = torch.cuda.memory_allocated()
    copied.to(device="cuda", dtype=dtype)
    assert torch.cuda.memory_allocated() - before == taken
