"""Tests of memfit.equivalence.weighting: what losses average over, inside a model and outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, check, sentences, token_loss
from memfit.equivalence.gradients import CheckSetup
from memfit.equivalence.randomness import Draws
from memfit.equivalence.samples import Samples
from memfit.equivalence.weighting import Weights, of_step
from memfit.records import GradientFault, LossWeighting, MixesIn, Verdict
from memfit.step.batches import Layout

CUTS = st.lists(st.integers(1, 5), min_size=2, max_size=5).filter(lambda cut: len(set(cut)) > 1)
UNEVEN = (3, 2, 2, 1)


class Scaled(nn.Module):
    """Returns its inputs, times a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.factor = nn.Parameter(torch.randn(NUM_CLASSES, NUM_CLASSES, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.factor


class Inside(Scaled):
    """Computes its loss itself, as language models and detectors do."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: torch.Tensor, *targets: torch.Tensor) -> Any:
        return {"loss": self.loss(super().forward(x), *targets)}


def scores(num_samples: int, *shape: int) -> torch.Tensor:
    """Return random class scores of shape (num_samples, *shape, NUM_CLASSES)."""
    torch.manual_seed(0)
    return torch.randn(num_samples, *shape, NUM_CLASSES, dtype=torch.float64)


def found(
    loss: Any, batch: tuple[Any, ...], cut: Sequence[int], *, inside: bool = False
) -> tuple[Weights, Samples]:
    """Return what is found for a loss; the model returns part of the batch times a factor."""
    model = Inside(loss) if inside else Scaled()
    num_samples = sum(cut)
    samples = Samples(
        batch=batch,
        layout=Layout.of(batch, num_samples=num_samples),
        split=lambda part: (part, ()) if inside else (part[0], part[1:]),
    )
    setup = CheckSetup(
        model=model,
        loss=(lambda outputs: outputs["loss"]) if inside else loss,
        samples=samples,
        device=torch.device("cpu"),
        precision=None,
        draws=Draws(model, num_samples),
    )
    return of_step(setup, cut), samples


@settings(max_examples=20, deadline=None)
@given(CUTS)
def test_a_mean_over_samples(cut: list[int]) -> None:
    """The weight of each micro-batch is its share of the samples."""
    total = sum(cut)
    weights, samples = found(
        F.cross_entropy, (scores(total), torch.randint(NUM_CLASSES, (total,))), cut
    )
    assert weights.weighting is LossWeighting.SAMPLES
    assert weights.of(cut, samples) == tuple((size / total,) for size in cut)


@settings(max_examples=10, deadline=None)
@given(CUTS, st.booleans())
def test_a_mean_over_valid_targets(cut: list[int], inside: bool) -> None:
    """The weight of each micro-batch is its share of the targets that are not ignored."""
    total = sum(cut)
    _, targets = sentences(total)
    weights, samples = found(token_loss, (scores(total, 8), targets), cut, inside=inside)
    counts = [int((part != -100).sum()) for part in targets.split(cut)]
    for (weight,), count in zip(weights.of(cut, samples), counts, strict=True):
        assert weight == pytest.approx(count / sum(counts))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ignored", [255, -1, 0])
def test_any_target_may_be_the_one_that_is_ignored(ignored: int, inside: bool) -> None:
    """Segmentation, detection and padding ignore different values."""
    torch.manual_seed(1)
    targets = torch.randint(1, NUM_CLASSES, (8, 6))
    for sample in range(8):
        targets[sample, : sample % 6] = ignored

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=ignored)

    weights, _ = found(loss, (scores(8, 6), targets), UNEVEN, inside=inside)
    assert weights.mixer is None
    assert [term.counts for term in weights.terms] == [f"(batch[1] != {ignored}).sum()"]


def test_labels_that_are_shifted_inside_the_model() -> None:
    """The first place of each sentence never counts."""
    _, targets = sentences(8)

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return token_loss(outputs[:, :-1], labels[:, 1:])

    weights, _ = found(loss, (scores(8, 8), targets.roll(1, 0)), UNEVEN, inside=True)
    assert weights.mixer is None
    assert [term.counts for term in weights.terms] == ["(batch[1][:, 1:] != -100).sum()"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_mask_that_is_averaged_over(inside: bool) -> None:
    """The mask may also be of floats that weigh the samples."""
    torch.manual_seed(0)
    for mask, text in (
        (torch.rand(8, 6) < torch.linspace(0.2, 0.9, 8)[:, None], "batch[1].sum()"),
        (torch.rand(8, 6), "batch[1].sum()"),
    ):

        def loss(outputs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            return (outputs.square().mean(-1) * kept).sum() / kept.sum()

        weights, _ = found(loss, (scores(8, 6), mask), UNEVEN, inside=inside)
        assert [term.counts for term in weights.terms] == [text]


def test_a_sum() -> None:
    """The weight of every micro-batch is 1."""

    def summed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    weights, samples = found(summed, (scores(6), torch.randint(NUM_CLASSES, (6,))), (3, 2, 1))
    assert weights.weighting is LossWeighting.SUM
    assert weights.of((4, 2), samples) == ((1.0,), (1.0,))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("is_known", [False, True])
def test_weights_of_classes(is_known: bool, inside: bool) -> None:
    """They are found in the loss if it keeps them, and worked out if it does not."""
    numbers = [0.1, 2.0, 1.0, 0.5, 3.0]
    class_weights = torch.tensor(numbers, dtype=torch.float64)

    def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = torch.tensor(numbers, dtype=torch.float64)
        return F.cross_entropy(outputs, targets, weight=weight, label_smoothing=0.1)

    known = nn.CrossEntropyLoss(weight=class_weights, label_smoothing=0.1)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1, 4])
    weights, samples = found(
        known if is_known else weighted, (scores(8), targets), UNEVEN, inside=inside
    )
    assert weights.weighting is LossWeighting.CLASSES
    shares = class_weights[targets]
    expected = [float(shares[:4].sum() / shares.sum()), float(shares[4:].sum() / shares.sum())]
    assert [share for (share,) in weights.of((4, 4), samples)] == pytest.approx(expected)


def test_a_rule_that_has_no_name() -> None:
    """The weights are measured from the loss's gradients."""

    def odd(outputs: torch.Tensor, targets: torch.Tensor, _spare: Any) -> torch.Tensor:
        count = (targets.double() ** 2 + 0.3).sqrt().sum()
        return F.cross_entropy(outputs, targets, reduction="sum").div(count)

    targets = torch.arange(8) % NUM_CLASSES
    torch.manual_seed(0)
    weights, samples = found(odd, (scores(8), targets, torch.randn(8)), UNEVEN)
    assert weights.mixer is not None or weights.weighting is not LossWeighting.SAMPLES
    shares = (targets.double() ** 2 + 0.3).sqrt()
    expected = [float(shares[:4].sum() / shares.sum()), float(shares[4:].sum() / shares.sum())]
    assert [share for (share,) in weights.of((4, 4), samples)] == pytest.approx(expected)


def two_means(outputs: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> Any:
    """Return a mean over targets, and a mean over what a mask selects."""
    return {
        "ce": F.cross_entropy(outputs.flatten(0, 1), targets.flatten()),
        "l1": (outputs.abs().mean(-1) * mask).sum() / mask.sum(),
    }


def two_batches() -> tuple[torch.Tensor, ...]:
    """Return scores, targets and a mask for `two_means`."""
    mask = torch.rand(8, 6) < torch.linspace(0.2, 0.9, 8)[:, None]
    return scores(8, 6), torch.randint(NUM_CLASSES, (8, 6)), mask


def test_several_losses_that_average_over_different_things() -> None:
    """Each loss has its own weights."""
    weights, _ = found(two_means, two_batches(), UNEVEN)
    assert weights.weighting is LossWeighting.SEVERAL
    assert [(t.name, t.weighting, t.counts) for t in weights.terms] == [
        ("ce", LossWeighting.SAMPLES, None),
        ("l1", LossWeighting.TARGETS, "batch[2].sum()"),
    ]


@pytest.mark.parametrize("inside", [False, True])
def test_one_number_that_adds_different_means(inside: bool) -> None:
    """No single weight is right; each summand has its own."""

    def loss(*args: torch.Tensor) -> torch.Tensor:
        losses = two_means(*args)
        total: torch.Tensor = losses["ce"] + 5 * losses["l1"]
        return total

    weights, _ = found(loss, two_batches(), UNEVEN, inside=inside)
    assert weights.mixer is None
    assert weights.adds_different_means
    assert [(t.weighting, t.counts, t.inside) for t in weights.terms] == [
        (LossWeighting.SAMPLES, None, True),
        (LossWeighting.TARGETS, "batch[2].sum()", True),
    ]


def contrastive(outputs: torch.Tensor, *_targets: Any) -> torch.Tensor:
    """Compare each sample with all others of its batch, as CLIP and SimCLR do."""
    unit = F.normalize(outputs, dim=1)
    return F.cross_entropy(unit @ unit.T / 0.1, torch.arange(len(outputs)))


def centred(outputs: torch.Tensor, *_targets: Any) -> torch.Tensor:
    """Return the variance over the batch."""
    return (outputs - outputs.mean(dim=0)).square().mean()


def squared_mean(outputs: torch.Tensor, *_targets: Any) -> torch.Tensor:
    """Return a squared mean: the gradients of its parts point the same way as the whole's."""
    return outputs.mean().square()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("loss", [contrastive, centred, squared_mean])
def test_a_loss_that_mixes(loss: Any, inside: bool) -> None:
    """No weights make its micro-batches add up, or only weights that are no counts."""
    weights, _ = found(loss, (scores(6),), (3, 2, 1), inside=inside)
    assert weights.mixer is not None
    assert (weights.mixer.name, weights.mixer.mixes_in) == ("loss", MixesIn.LOSS)


def hardest(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of the hardest sample."""
    return F.cross_entropy(outputs, targets, reduction="none").max()


def harder_half(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the harder half of the samples."""
    return F.cross_entropy(outputs, targets, reduction="none").topk(len(outputs) // 2).values.mean()


@pytest.mark.parametrize("loss", [hardest, harder_half])
def test_a_loss_over_the_hardest_samples_mixes(loss: Any) -> None:
    """Some weights are exact for this batch, but other outputs need other weights."""
    torch.manual_seed(3)
    data, classes = torch.randn(8, 6), torch.randint(3, (8,))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    result = check(model, loss, (data, classes), accumulation_steps=2)
    assert result.verdict is Verdict.DIFFERS
    assert result.faults == (GradientFault.MIXES_SAMPLES,)
    assert [mixer.name for mixer in result.mixing_layers] == ["loss"]
