"""Objects that cannot take accumulated steps are refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.scheduler
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.optim import Optimizer, lr_scheduler

from memfit import Accumulator, Workload, estimate
from memfit.errors import UsageError, WorkloadError


class SharpnessAware(Optimizer):
    """Works like the well-known implementation of SAM: its step needs a closure when it runs."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def first_step(self) -> None:
        """Climb."""

    def second_step(self) -> None:
        """Descend from there."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refuse to go without a closure."""
        assert closure is not None, "requires closure"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lr_scheduler.ReduceLROnPlateau,
            r"ReduceLROnPlateau.step needs metrics, which .* yourself: step\(metrics\) where",
        ),
        (
            lambda optimizer: timm.scheduler.CosineLRScheduler(optimizer, t_initial=10),
            r"CosineLRScheduler.step needs epoch, which .* step_update\(num_updates\) after",
        ),
        (lambda _optimizer: object(), "A scheduler has a method step\\(\\), and object has none"),
    ],
)
def test_schedulers_that_have_to_be_told_something_are_refused(
    make: Callable[[Optimizer], Any], says: str
) -> None:
    """They are refused at once, before the weights have changed."""
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=says):
        Accumulator(model, optimizer, 4, loss=F.cross_entropy, scheduler=make(optimizer))


def test_schedulers_that_need_nothing_are_stepped() -> None:
    """torch's own schedulers are stepped, one after another or together."""
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=1)
    scheduler = lr_scheduler.ChainedScheduler([constant])
    accumulator = Accumulator(model, optimizer, 4, loss=F.cross_entropy, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.05
    accumulator.step((torch.randn(8, 8), torch.randint(3, (8,))))
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("make", [torch.optim.LBFGS, SharpnessAware])
def test_optimizers_that_ask_for_the_loss_again_are_refused(make: Any) -> None:
    """An `Accumulator`, a workload and a function that makes them all refuse."""
    model = nn.Linear(8, 3)
    says = f"{make.__name__} runs forward and backward again in its own step"
    with pytest.raises(WorkloadError, match=says):
        Accumulator(model, make(model.parameters()), 4, loss=F.cross_entropy)
    batch = (torch.randn(8, 8), torch.randint(3, (8,)))
    with pytest.raises(WorkloadError, match=says):
        Workload(model, batch, F.cross_entropy, make(model.parameters()))


@pytest.mark.parametrize("recover", [True, False])
def test_an_optimizer_of_another_model_is_refused(recover: bool) -> None:
    """It would train nothing. The sentence is that of a workload."""
    model, other = nn.Linear(8, 3), nn.Linear(8, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    says = r"holds no parameter of the model. Make it from this model: SGD\(model.parameters"
    with pytest.raises(WorkloadError, match=says):
        Accumulator(model, optimizer, 4, loss=F.cross_entropy, recover=recover)
    batch = (torch.randn(8, 8), torch.randint(3, (8,)))
    with pytest.raises(WorkloadError, match=says):
        Workload(model, batch, F.cross_entropy, optimizer)


class AsksWhenItSteps(Optimizer):
    """Nothing but an error in its step tells that it needs a closure."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refuse to go without a closure."""
        assert closure is not None, "this optimizer needs a closure"


def test_an_optimizer_that_asks_for_the_loss_when_it_steps() -> None:
    """Its error is explained, in training and in a trial, and no gradient is left."""
    model = nn.Linear(8, 3)
    batch = (torch.randn(8, 8), torch.randint(3, (8,)))
    optimizer = AsksWhenItSteps(model.parameters())
    says = "AsksWhenItSteps runs forward and backward again in its own step"
    with pytest.raises(WorkloadError, match=says):
        Accumulator(model, optimizer, 4, loss=F.cross_entropy).step(batch)
    assert model.weight.grad is None
    workload = Workload(model, batch, F.cross_entropy, optimizer)
    with pytest.raises(WorkloadError, match=says):
        estimate(workload, 4, gpu="rtx3060", engine="simulate")


class Broken(torch.optim.SGD):
    """Fails when it steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fail."""
        raise RuntimeError("broken")


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize("where", ["optimizer", "loss"])
def test_an_error_leaves_no_gradient(where: str, recover: bool) -> None:
    """The error may come from the optimizer's step or from the user's loss."""
    model = nn.Linear(8, 3)
    num_calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if where == "loss" and num_calls == 2:
            raise RuntimeError("broken")
        return F.cross_entropy(outputs, targets)

    kind = Broken if where == "optimizer" else torch.optim.SGD
    accumulator = Accumulator(
        model, kind(model.parameters(), lr=0.1), 4, loss=loss, recover=recover
    )
    with pytest.raises(RuntimeError, match="broken"):
        accumulator.step((torch.randn(8, 8), torch.randint(3, (8,))))
    assert all(parameter.grad is None for parameter in model.parameters())
