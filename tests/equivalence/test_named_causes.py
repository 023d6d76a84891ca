"""Causes that are named: variables, layers that see the cut, and what a loss counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, WIDTH, check, mlp
from memfit.records import GradientFault, LossWeighting, Verdict


class CountingInItsClass(nn.Module):
    """Counts its calls in an attribute of the class."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return x * (1 + 0.1 * self.calls)


_num_calls = 0


class CountingGlobally(nn.Module):
    """Counts its calls in a global variable."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global _num_calls  # noqa: PLW0603 - what is tested
        _num_calls += 1
        return x * (1 + 0.1 * _num_calls)


def test_variables_of_the_code_are_state() -> None:
    """A class, a global and a nonlocal variable that count calls are named, and put back."""
    num_losses = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal num_losses
        num_losses += 1
        return F.cross_entropy(outputs, targets) * (1 + 0.1 * num_losses)

    for model, loss_of, name in (
        (mlp(CountingInItsClass()), F.cross_entropy, "CountingInItsClass.calls"),
        (mlp(CountingGlobally()), F.cross_entropy, "the global variable _num_calls"),
        (mlp(), loss, "num_losses of loss"),
    ):
        result = check(model, loss_of)
        assert result.faults == (GradientFault.CARRIES_STATE,)
        assert result.carried == (name,)
    assert (CountingInItsClass.calls, _num_calls, num_losses) == (0, 0, 0)


def test_a_small_difference_by_state_is_named() -> None:
    """Spectral normalisation moves its vectors in each forward pass, at the end very little."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH), n_power_iterations=12)
    for _ in range(8):
        layer(torch.zeros(1, WIDTH))
    result = check(mlp(layer))
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.CARRIES_STATE,))
    error = result.worst_relative_error("fp64")
    assert error is not None
    assert error < 1e-6


class DividedByTheLargest(nn.Module):
    """Divides by the largest value of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().max()


class Scaled(nn.Module):
    """Divides by the sum of a batch whose last sample is far larger than the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x[:, 0].max()) > 5 else x


@pytest.mark.parametrize("layer", [DividedByTheLargest(), Scaled()])
def test_a_layer_that_sees_the_whole_batch_is_named(layer: nn.Module) -> None:
    """Exchanging one sample does not show it; the halves of the batch do."""

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = torch.randn(size, WIDTH), torch.arange(size) % NUM_CLASSES
        x[5] = 9
        return x, y

    torch.manual_seed(0)
    result = check(nn.Sequential(layer, *mlp()), F.cross_entropy, batch)
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.MIXES_SAMPLES,))
    assert [mixer.name for mixer in result.mixing_layers] == ["0"]


def test_a_penalty_on_the_weights_beside_a_sum() -> None:
    """The outputs' gradients do not show it, and the parameters' do."""
    model = mlp()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(outputs, targets, reduction="sum") + 0.1 * penalty

    result = check(model, loss)
    assert result.faults == (GradientFault.ADDS_DIFFERENT_MEANS,)
    assert {term.weighting for term in result.terms} == {LossWeighting.SUM, LossWeighting.SAMPLES}


def test_a_loss_that_is_divided_by_at_least_one() -> None:
    """Detection losses divide by the objects in the batch, or by 1 if there are none."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        total = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum")
        return total / (targets > 0).sum().clamp(min=1)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, WIDTH), torch.arange(size) % 7 // 4

    result = check(mlp(), loss, batch)
    assert result.verdict is Verdict.EQUAL
    assert result.terms[0].counts == "(batch[1] != 0).sum().clamp(min=1)"
    assert result.off_by_samples is not None
    assert result.off_by_samples > 0.1
