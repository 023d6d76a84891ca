"""A loss that is NaN because a micro-batch has no valid target is explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from memfit import Accumulator
from memfit.errors import WorkloadError


def _masked_mean(outputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] * mask).sum() / mask.sum()


def _ignoring(value: int) -> Callable[..., torch.Tensor]:
    return lambda outputs, targets: F.cross_entropy(outputs, targets, ignore_index=value)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["", "scaled"])
@pytest.mark.parametrize(
    ("loss", "targets", "advice"),
    [
        (_ignoring(-100), torch.tensor([0, 1, -100, -100]), r"\(batch\[1\] != -100\)\.sum\(\)"),
        (_ignoring(255), torch.tensor([0, 1, 255, 255]), r"\(batch\[1\] != 255\)\.sum\(\)"),
        (_masked_mean, torch.tensor([True, True, False, False]), r"batch: batch\[1\]\.sum\(\)"),
    ],
    ids=["-100", "255", "mask"],
)
def test_a_micro_batch_without_valid_targets_is_named(
    loss: Any, targets: torch.Tensor, advice: str, scaler: torch.amp.GradScaler | None
) -> None:
    """The weights do not move, and the message gives the count to use."""
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), 0.1), 2, loss=loss, scaler=scaler
    )
    with pytest.raises(WorkloadError, match=f"Micro-batch 2 of 2 has no valid target.*{advice}"):
        accumulator.step((torch.ones(4, 3), targets))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_another_nan_is_the_users() -> None:
    """Inputs that are NaN give a loss that is NaN, and no message about targets."""
    model = nn.Linear(3, 3)
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), 0.1), 2, loss=F.cross_entropy, recover=False
    )
    loss = accumulator.step((torch.full((4, 3), torch.nan), torch.tensor([0, 1, 2, 0])))
    assert torch.isnan(loss)
