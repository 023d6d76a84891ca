"""Tests of memfit.equivalence.weighting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, sentences, token_loss
from memfit.equivalence.weighting import of_loss
from memfit.records import LossWeighting, MixesIn

CUTS = st.lists(st.integers(1, 5), min_size=2, max_size=5).filter(lambda cut: len(set(cut)) > 1)


def scores(num_samples: int, *shape: int) -> torch.Tensor:
    """Random class scores of shape (num_samples, *shape, NUM_CLASSES)."""
    return torch.randn(num_samples, *shape, NUM_CLASSES, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(CUTS)
def test_a_mean_over_samples(cut: list[int]) -> None:
    """Each micro-batch counts by its samples."""
    total = sum(cut)
    targets = (torch.randint(NUM_CLASSES, (total,)),)
    found = of_loss(F.cross_entropy, scores(total), targets, cut)
    assert found.weighting is LossWeighting.SAMPLES
    assert found.of(cut, None, targets) == pytest.approx([size / total for size in cut])


@settings(max_examples=20, deadline=None)
@given(CUTS)
def test_a_mean_over_valid_targets(cut: list[int]) -> None:
    """Each micro-batch counts by the targets that are not ignored."""
    total = sum(cut)
    _, targets = sentences(total)
    found = of_loss(token_loss, scores(total, 8), (targets,), cut)
    counts = [int((part != -100).sum()) for part in targets.split(cut)]
    assert found.of(cut, None, (targets,)) == pytest.approx(
        [count / sum(counts) for count in counts]
    )


def test_a_sum() -> None:
    """Every micro-batch counts once."""

    def summed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    targets = (torch.randint(NUM_CLASSES, (6,)),)
    found = of_loss(summed, scores(6), targets, (3, 2, 1))
    assert found.weighting is LossWeighting.SUM
    assert found.of((4, 2), None, targets) == (1.0, 1.0)


def test_a_rule_that_has_no_name() -> None:
    """Weights of classes: what the loss averages over is read off its gradients."""
    class_weights = torch.tensor([0.1, 2.0, 1.0, 0.5, 3.0], dtype=torch.float64)

    def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, weight=class_weights)

    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    found = of_loss(weighted, scores(6), (targets,), (3, 2, 1))
    assert found.weighting is LossWeighting.MEASURED
    shares = class_weights[targets]
    expected = [float(shares[:4].sum() / shares.sum()), float(shares[4:].sum() / shares.sum())]
    assert found.of((4, 2), None, (targets,)) == pytest.approx(expected)


def contrastive(outputs: torch.Tensor, *_targets: Any) -> torch.Tensor:
    """Each sample against all others of its batch, as CLIP and SimCLR have it."""
    unit = F.normalize(outputs, dim=1)
    return F.cross_entropy(unit @ unit.T / 0.1, torch.arange(len(outputs)))


def centred(outputs: torch.Tensor, *_targets: Any) -> torch.Tensor:
    """The variance over the batch."""
    return (outputs - outputs.mean(dim=0)).square().mean()


@pytest.mark.parametrize("loss", [contrastive, centred])
def test_a_loss_that_mixes(loss: Any) -> None:
    """No weights make its micro-batches add up."""
    found = of_loss(loss, scores(6), (), (3, 2, 1))
    assert found.mixer is not None
    assert (found.mixer.name, found.mixer.mixes_in) == ("loss", MixesIn.LOSS)
    assert found.mixer.moved > 0.01
