"""Tests of memfit.equivalence.randomness, through the modules that use it."""

from __future__ import annotations

import io
import random

import pytest
import torch
from rich.console import Console
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, WIDTH, check, mlp
from memfit.records import GradientFault, LossWeighting, Verdict
from memfit.reports.equivalence import render


class Noise(nn.Module):
    """Adds noise, also in evaluation mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * torch.randn_like(x) * torch.rand(len(x), 1, dtype=x.dtype)


class FunctionalDropout(nn.Module):
    """Drops values without a dropout layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.4, training=self.training)


class FusedDropout(nn.Module):
    """The operator of dropout on a GPU: one kernel that draws, masks and scales."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped, _ = torch.native_dropout(x, 0.4, self.training)
        return dropped


class LastSampleFirst(nn.Module):
    """Draws for its samples in an unusual order, so that no draw can be matched to its sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x + torch.rand(2 * len(x) + 1, 1, dtype=x.dtype)[: len(x)]


class DroppedAttention(nn.Module):
    """Attention with dropout of its weights, whose draws have the shape (samples x heads, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x[:, None] * torch.linspace(0.5, 1.5, 3, dtype=x.dtype)[None, :, None]
        attended, _ = self.inner(tokens, tokens, tokens)
        return self.head(attended.mean(dim=1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.3), DropPath(0.4), Noise(), FunctionalDropout(), FusedDropout()]
)
def test_draws_are_replayed_sample_by_sample(layer: nn.Module) -> None:
    """Dropout, stochastic depth and noise are not reported as differences."""
    result = check(mlp(layer))
    assert result.verdict is Verdict.EQUAL
    assert result.replayed == ("2",)
    assert result.switched_off == ()


def test_draws_of_several_rows_for_each_sample() -> None:
    """Attention heads draw several rows for one sample."""
    torch.manual_seed(0)
    result = check(DroppedAttention())
    assert result.verdict is Verdict.EQUAL
    assert result.replayed == ("inner",)


def test_what_cannot_be_replayed_is_switched_off_and_said() -> None:
    """It is not reported as a difference."""
    result = check(mlp(LastSampleFirst()))
    assert result.verdict is Verdict.EQUAL
    assert result.switched_off == ("2",)


def test_a_mixing_layer_is_found_beside_random_ones() -> None:
    """The random layers do not move the samples that were not changed."""
    result = check(mlp(nn.Dropout(0.3), nn.BatchNorm1d(WIDTH), Noise()))
    assert result.verdict is Verdict.DIFFERS
    assert [mixer.name for mixer in result.mixing_layers] == ["3"]


class Sampler(nn.Module):
    """Keeps some positive elements of each sample, as a detector samples its boxes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in x:
            kept = torch.zeros_like(row)
            positive = torch.where(row > 0)[0]
            kept[positive[torch.randperm(len(positive))[:2]]] = 1
            rows.append(row * kept)
        return torch.stack(rows)


def test_draws_of_a_loop_over_samples_are_replayed() -> None:
    """Each sample gets its own permutation again, whose length depends on the sample."""
    result = check(mlp(Sampler()))
    assert (result.verdict, result.replayed) == (Verdict.EQUAL, ("2",))


class Detector(nn.Module):
    """Samples boxes of each image at random, and computes its losses inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, num_boxes: torch.Tensor) -> torch.Tensor:
        losses = []
        for row, number in zip(x, num_boxes.tolist(), strict=True):
            boxes = self.inner(row * torch.arange(1.0, 1 + number, dtype=x.dtype)[:, None])
            losses.append(boxes[torch.randperm(number)[:3]].square().sum())
        return torch.stack(losses).sum() / (3 * len(x))


@pytest.mark.parametrize("spread", [8, 7])
def test_samples_drawn_by_a_detector(spread: int) -> None:
    """Some images have as many boxes as the batch has images, or as another image has."""
    numbers = torch.tensor([8, 16, 9, 8, 11, 9, 8, 24])
    batch = {"x": torch.randn(8, WIDTH), "num_boxes": numbers.clamp(max=3 * spread)}
    result = check(Detector(), lambda loss: loss, batch, accumulation_steps=2)
    assert result.verdict is Verdict.EQUAL
    assert result.terms[0].weighting is LossWeighting.SAMPLES


class DrawnFromTheBatch(nn.Module):
    """Draws as many numbers as the batch has positive elements, and runs only in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise RuntimeError("no losses in evaluation mode")
        result = x.clone()
        result[x > 0] += torch.rand(int((x > 0).sum()), dtype=x.dtype)
        return result


def test_a_layer_that_cannot_be_switched_off() -> None:
    """Its draws are named as the cause, because nothing else can be said."""
    result = check(mlp(DrawnFromTheBatch()))
    assert result.verdict is Verdict.DIFFERS
    assert GradientFault.DRAWS_NOT_REPLAYED in result.faults
    assert result.switched_off == ()


class LayerDrop(nn.Module):
    """Skips a layer in half of all passes, by a number that Python draws."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = random.random() < 0.5  # noqa: S311 - of a layer
        return x if skips and self.training else torch.tanh(self.inner(x))


@pytest.mark.parametrize("is_drawing", [True, False])
def test_a_number_that_python_draws_for_a_whole_pass(is_drawing: bool) -> None:
    """It is the same in every pass, and the report says that numbers were drawn."""
    result = check(mlp(LayerDrop() if is_drawing else nn.Dropout(0.3)))
    assert result.verdict is Verdict.EQUAL
    assert result.draws_on_host is is_drawing
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(result))
    assert ("Python or NumPy drew random numbers." in console.export_text()) is is_drawing
