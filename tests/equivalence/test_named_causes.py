"""Causes that are named: variables, layers that see the cut, and what a loss counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, WIDTH, TimesSamples, check, mlp, vectors
from memfit.errors import WorkloadError
from memfit.records import GradientFault, LossWeighting, MixesIn, Verdict


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


def test_a_loop_over_images_that_adds_different_means() -> None:
    """Summands that are computed alike are measured together, so each kind has its count."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor | float = 0.0
        for output, target, counted in zip(outputs, targets, mask, strict=True):
            total = total + F.cross_entropy(output[None], target[None]) / len(outputs)
            if counted:  # an image without boxes adds no summand
                total = total + 5 * output.abs().sum() / mask.sum()
        assert isinstance(total, torch.Tensor)
        return total

    batch = (torch.randn(12, WIDTH), torch.arange(12) % NUM_CLASSES, torch.arange(12) % 5 > 2)
    result = check(mlp(), loss, batch)
    assert (result.mixers, result.faults) == ((), (GradientFault.ADDS_DIFFERENT_MEANS,))
    assert [(term.name, term.counts) for term in result.terms] == [
        ("summand 1", None),
        ("summand 2", "batch[2].sum()"),
    ]
    assert all(term.unexplained < 1e-12 for term in result.terms)


class Branched(nn.Module):
    """Adds what its inner layers return to what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), TimesSamples())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_backward_pass_that_depends_on_the_batch_size(is_inside: bool) -> None:
    """The layer is named, not the loss, wherever the loss is computed."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(Branched())

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.net(x), y)

    if is_inside:
        batch = dict(zip(("x", "y"), vectors(12), strict=True))
        result = check(WithLoss(), lambda loss: loss, batch)
    else:
        result = check(mlp(Branched()))
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.MIXES_SAMPLES,))
    assert [(mixer.name, mixer.mixes_in) for mixer in result.mixing_layers] == [
        (f"{'net.' if is_inside else ''}2.inner.1", MixesIn.BACKWARD)
    ]


class CutToTheLongest(nn.Module):
    """Cuts the padding off that the whole batch shares, and lets the rest be read."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.head(self.read(x[:, : int(lengths.max())])[0].mean(1))  # type: ignore[no-any-return]


def test_a_layer_that_is_given_values_of_another_shape_is_not_named() -> None:
    """The layer that cut them is named: its inner layers do their work sample by sample."""
    lengths = torch.tensor([2, 2, 3, 1, 6, 4, 5, 2])
    batch = {"x": torch.randn(8, 6, WIDTH), "lengths": lengths}
    result = check(CutToTheLongest(), lambda o: o.square().mean(), batch, accumulation_steps=2)
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.MIXES_SAMPLES,))
    assert [mixer.name for mixer in result.mixing_layers] == ["the model itself"]


class CutMix(nn.Module):
    """Takes a part of each image from another, and returns from which."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(len(x)).flip(0)
        return self.net(torch.cat([x[places, :3], x[:, 3:]], dim=1)), places


class Pairs(nn.Module):
    """Returns a score for each pair of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = F.normalize(self.net(x))
        return features @ features.T


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (CutMix(), lambda o, y: F.cross_entropy(o[0], y) + F.cross_entropy(o[0], y[o[1]])),
        (Pairs(), lambda o, _y: F.cross_entropy(o, torch.arange(len(o)))),
    ],
    ids=["places", "pairs"],
)
def test_outputs_that_cannot_be_cut(model: nn.Module, loss: Any) -> None:
    """A loss that refuses some samples' outputs is weighed in the parameters."""
    result = check(model, loss, accumulation_steps=2)
    assert (result.verdict, result.mixers[0].name) == (Verdict.DIFFERS, "the model itself")
    assert GradientFault.MIXES_SAMPLES in result.faults


@pytest.mark.parametrize("ignored", [-100, 255])
def test_classes_of_ignored_targets_have_no_weight(ignored: int) -> None:
    """The count is written so that it runs on the batch: it looks up no ignored target."""
    weights = torch.linspace(0.2, 5, NUM_CLASSES)
    batch = vectors(12)
    batch[1][::5] = ignored
    loss = nn.CrossEntropyLoss(weights, ignore_index=ignored, label_smoothing=0.1)
    result = check(mlp(), loss, batch)
    assert (result.verdict, result.weighting) == (Verdict.EQUAL, LossWeighting.CLASSES)
    text = result.terms[0].counts
    assert text is not None
    counted = batch[1][batch[1] != ignored]
    written = eval(text, {"weight": weights, "batch": batch})  # noqa: S307 - our own text
    assert torch.equal(written, weights[counted].sum())


def test_lengths_come_before_labels_that_happen_to_count_the_same() -> None:
    """CTC divides by the lengths of its targets; 2 marks no ignored target here."""
    targets, lengths = (
        torch.tensor([[1, 2], [2, 1], [3, 1], [4, 3]] * 3),
        torch.tensor([1, 1, 2, 2] * 3),
    )

    def loss(outputs: torch.Tensor, _targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum() / lengths.sum()

    result = check(mlp(), loss, (torch.randn(12, WIDTH), targets, lengths))
    assert [term.counts for term in result.terms] == ["batch[2].sum()"]


def test_a_batch_that_ignores_every_target() -> None:
    """Its loss is 0 / 0, and the sentence names the targets."""
    batch = (torch.randn(12, WIDTH), torch.full((12,), -100))
    with pytest.raises(WorkloadError, match=r"no valid target: batch\[1\] is -100 everywhere"):
        check(mlp(), F.cross_entropy, batch)
