"""Steps that name types, differentiate in forward, or checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.checkpoint import checkpoint

from equivalence.models import NUM_CLASSES, WIDTH, Rolled, check, fp64_error, mlp, vectors
from memfit.records import Verdict


def _recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(WIDTH, NUM_CLASSES, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(1, len(x), NUM_CLASSES, dtype=torch.float32)
            return self.inner(x[:, None], (zeros, zeros))[0][:, -1]  # type: ignore[no-any-return]

    return Recurrent()


def _weighed(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, y, weight=torch.linspace(0.2, 5, NUM_CLASSES, dtype=torch.float32))


def _one_hot(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy(o.sigmoid(), F.one_hot(y, NUM_CLASSES).float())


class Forces(nn.Module):
    """Returns the derivative of its own output, as models of molecules do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(x).square().sum(), x, create_graph=True)
        return slope[:, :NUM_CLASSES]


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (_recurrent(), F.cross_entropy),
        (mlp(), _weighed),
        (mlp(), _one_hot),
        (mlp(), nn.CrossEntropyLoss(torch.linspace(0.2, 5, NUM_CLASSES), label_smoothing=0.1)),
        (Forces(), F.cross_entropy),
    ],
    ids=["zeros", "class weights", "one-hot", "smoothing", "forces"],
)
def test_ordinary_steps_run_in_float64(model: nn.Module, loss: Any) -> None:
    """They may name other types, and they may differentiate in forward."""
    result = check(model, loss)
    assert result.verdict is Verdict.EQUAL
    assert result.single_precision is None
    assert fp64_error(result) < 1e-10


def test_float32_stands_in_where_float64_cannot_be_had() -> None:
    """The result gives the reason."""

    class OnlySingle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype is not torch.float32:
                raise NotImplementedError("this kernel takes float32")
            return x

    result = check(mlp(OnlySingle()))
    assert result.verdict is Verdict.EQUAL
    assert result.single_precision == "NotImplementedError: this kernel takes float32"
    assert {one.precision for one in result.checks} == {"fp32"}
    assert all(d.bound <= 1e-4 for d in result.checks[0].worst)
    assert check(mlp(OnlySingle(), Rolled())).verdict is Verdict.DIFFERS


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("reentrant", "verdict"), [(True, "detached"), (False, "equal")])
def test_a_checkpoint_that_cuts_gradients_off(reentrant: bool, verdict: str) -> None:
    """A reentrant checkpoint does it if its inputs need no gradient."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
            self.last = nn.Linear(WIDTH, NUM_CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner: torch.Tensor = checkpoint(self.first, x, use_reentrant=reentrant)
            return self.last(inner)  # type: ignore[no-any-return]

    result = check(Checkpointed())
    assert result.verdict.value == verdict
    assert result.detaching == (("first",) if reentrant else ())


def test_the_ceiling_in_float64() -> None:
    """No bound is above a millionth, and the JSON has no NaN or infinity."""
    for model in (mlp(), mlp(Rolled()), mlp(nn.BatchNorm1d(WIDTH))):
        result = check(model, batch=vectors)
        assert all(
            difference.bound <= 1e-6
            for one in result.checks
            if one.precision == "fp64"
            for difference in one.worst
        )
        json.dumps(result.to_dict(), allow_nan=False)
