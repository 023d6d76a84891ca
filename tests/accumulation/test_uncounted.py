"""Losses that a micro-batch has no valid target for, and losses that have no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.parts import GradientRecorder, full_batch_gradients, relative_error
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


@pytest.mark.parametrize("weight", ["samples", {"loss": None, "accuracy": "samples"}])
def test_a_loss_without_a_gradient_is_added_to_the_number_alone(weight: Any) -> None:
    """An accuracy among the losses changes no gradient, also where nothing else counts."""
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    y[:4] = -100
    count: dict[str, Any] = {"loss": lambda b: (b[1] >= 0).sum(), "accuracy": "samples"}

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        right = (outputs.argmax(1) == targets).to(outputs.dtype).mean()
        by_target = F.cross_entropy(outputs, targets)
        mean = outputs.square().mean()
        return {"loss": by_target if isinstance(weight, dict) else mean, "accuracy": right}

    expected = full_batch_gradients(model, optimizer, lambda: losses(model(x), y)["loss"])
    whole = sum(loss.item() for loss in losses(model(x), y).values())
    seen = GradientRecorder(optimizer)
    accumulator = Accumulator(
        model, optimizer, 4, loss=losses, weight=count if isinstance(weight, dict) else weight
    )
    assert float(accumulator.step((x, y))) == pytest.approx(whole, rel=1e-12)
    assert relative_error(seen.steps[0], expected) < 1e-10


def test_losses_without_any_gradient_get_a_sentence() -> None:
    """Nothing could be trained."""
    model = nn.Linear(6, 3)

    def losses(outputs: torch.Tensor, _targets: torch.Tensor) -> list[torch.Tensor]:
        return [outputs.detach().mean(), outputs.detach().abs().mean()]

    accumulator = Accumulator(model, torch.optim.SGD(model.parameters()), 4, loss=losses)
    with pytest.raises(WorkloadError, match="None of the losses has a gradient"):
        accumulator.step((torch.randn(8, 6), torch.randint(3, (8,))))
