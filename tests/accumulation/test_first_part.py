"""The first micro-batch shows a sum that is weighted as a mean, and gradients that are dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.parts import out_of_memory
from memfit import Accumulator
from memfit.errors import WorkloadError

X, Y = torch.randn(6, 8), torch.randint(3, (6,))

Loss = Callable[..., Any]


def distances(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - F.one_hot(targets, 3).float()).square()


def one_hot_bce(outputs: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs, F.one_hot(targets, 3).float(), **options)


SUMS: dict[str, Loss] = {
    "a module": nn.CrossEntropyLoss(reduction="sum"),
    "weights of classes": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    "part of a function": functools.partial(F.cross_entropy, reduction="sum"),
    "binary": functools.partial(one_hot_bce, reduction="sum"),
    "a sum of losses": lambda out, y: F.cross_entropy(out, y, reduction="none").sum(),
    "squares": lambda out, y: distances(out, y).sum(),
    "squares of each sample": lambda out, y: distances(out, y).sum(1).sum(),
    "two sums": lambda out, y: F.cross_entropy(out, y, reduction="sum") + distances(out, y).sum(),
    "one of two": lambda out, y: (F.cross_entropy(out, y), distances(out, y).sum()),
}

MEANS: dict[str, Loss] = {
    "a module": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "a mean of losses": lambda out, y: F.cross_entropy(out, y, reduction="none").mean(),
    "a sum, divided": lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y),
    "summands, divided": lambda out, y: (distances(out, y) / len(y)).sum(),
    "given weights": lambda out, y: one_hot_bce(
        out, y, weight=torch.full_like(out, 1 / len(y)), reduction="sum"
    ),
    "a mean for each class": lambda out, y: distances(out, y).mean(0).sum(),
    "means, added": lambda out, y: F.cross_entropy(out, y) + distances(out, y).mean(),
    "products": lambda out, y: (out * F.one_hot(y, 3) * (1 / len(y))).sum(),
}


def trained(loss: Loss, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Accumulator(model, optimizer, 4, loss=loss, **options).step((X, Y))
    return model


@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("recover", [True, False])
def test_a_sum_that_would_be_weighted_as_a_mean_is_refused(loss: Loss, recover: bool) -> None:
    """Its gradient would be too small. Nothing has moved, and the sentence names the way out."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, 4, loss=loss, recover=recover)
    with pytest.raises(WorkloadError, match=r"The loss is a sum, .*give weight='sum'"):
        accumulator.step((X, Y))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_a_mean_is_never_taken_for_a_sum(loss: Loss) -> None:
    """However it is written, the step equals that of the whole batch."""
    torch.manual_seed(0)
    whole = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    loss(whole(X), Y).backward()
    optimizer.step()
    torch.testing.assert_close(trained(loss).weight, whole.weight)


def test_a_model_that_computes_its_loss() -> None:
    """A sum inside the model is refused, and the mean of such a sum is not."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 3)

        def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            """Return the loss and the scores."""
            scores = self.last(batch["x"])
            return F.cross_entropy(scores, batch["y"], reduction="sum"), scores

    model = WithLoss()
    batch = {"x": X, "y": Y}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(WorkloadError, match="The loss is a sum"):
        Accumulator(model, optimizer, 4, loss=lambda out: out[0]).step(batch)
    Accumulator(model, optimizer, 4, loss=lambda out: out[0] / len(out[1])).step(batch)


def test_other_weights_are_taken_at_their_word() -> None:
    """A user who counts the samples knows what the loss is."""
    trained(SUMS["squares"], weight="sum")
    trained(SUMS["squares"], weight=lambda batch: len(batch[1]))
    trained(SUMS["one of two"], weight=("samples", "sum"))


@pytest.mark.parametrize("recover", [True, False])
def test_a_hook_that_drops_gradients_is_refused(recover: bool) -> None:
    """An optimizer that steps in the backward pass leaves nothing to accumulate."""
    model = nn.Linear(8, 3)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, 4, loss=F.cross_entropy, recover=recover)
    with pytest.raises(WorkloadError, match="The backward pass left no gradient"):
        accumulator.step((X, Y))


def test_a_hook_is_refused_also_after_a_backward_that_ran_out() -> None:
    """The first micro-batch did not get as far as the check."""
    model = nn.Linear(8, 3)
    failures = [out_of_memory()]

    def drop(parameter: torch.Tensor) -> None:
        if failures:
            raise failures.pop()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, 4, loss=F.cross_entropy)
    with pytest.raises(WorkloadError, match="The backward pass left no gradient"):
        accumulator.step((X, Y))
    assert not failures
