"""What is said of a step that cannot be simulated, and whose errors are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memfit.errors import NotSimulatedError
from memfit.simulation.tracing.refusals import explained


class Raises(nn.Module):
    """Raises what it is told to, or does what it is given."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, data: torch.Tensor) -> Any:
        if isinstance(self.what, Exception):
            raise self.what
        return self.what(data)


def run(what: Any) -> None:
    model = nn.Sequential(Raises(what))
    with explained(model, "Net"):
        model(torch.zeros(3, device="meta"))


@pytest.mark.parametrize(
    "message",
    [
        "bad metadata of the sample",
        "the meta tensor of my own library is wrong",
        "meta-learning step failed: meta device",
    ],
)
def test_a_users_own_error_is_the_users(message: str) -> None:
    """Whatever words it has."""
    with pytest.raises(RuntimeError, match=message) as caught:
        run(RuntimeError(message))
    assert not isinstance(caught.value, NotSimulatedError)


def test_torchs_error_about_anything_else_is_torchs() -> None:
    """A wrong shape is no want of values."""
    with pytest.raises(RuntimeError, match=r"shape|size"):
        run(lambda data: data.view(2, 2))


@pytest.mark.parametrize(
    "what",
    [
        lambda data: data.sum().item(),
        lambda data: bool(data.all()),
        lambda data: data.nonzero(),
        lambda data: data.cpu(),
        lambda data: data.numpy(),
        lambda data: torch.equal(data, data),
        lambda data: data.tolist(),
    ],
)
def test_a_need_for_values_names_the_module(what: Any) -> None:
    """And says what else can be done."""
    with pytest.raises(NotSimulatedError, match=r"Net cannot .*Raises '0' needs.*memfit rehearse"):
        run(what)


def test_a_tensor_of_the_cpu_has_a_reason_of_its_own() -> None:
    """It would not run on a GPU either."""
    with pytest.raises(NotSimulatedError, match=r"Raises '0' takes a tensor of the CPU beside"):
        run(lambda data: data + torch.zeros(3))
