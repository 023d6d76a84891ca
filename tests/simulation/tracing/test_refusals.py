"""What is said about a step that cannot be simulated; other errors are not changed."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from memfit.errors import NotSimulatedError
from memfit.simulation.tracing.refusals import explained, refuse_compiled, refuse_sparse


class Raises(nn.Module):
    """Raises a given exception, or calls a given function."""

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
    """The words of the error do not matter."""
    with pytest.raises(RuntimeError, match=message) as caught:
        run(RuntimeError(message))
    assert not isinstance(caught.value, NotSimulatedError)


def test_torchs_error_about_anything_else_is_torchs() -> None:
    """A wrong shape has nothing to do with missing values."""
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
    """It also says what else can be done."""
    with pytest.raises(NotSimulatedError, match=r"Net cannot .*Raises '0' needs.*memfit rehearse"):
        run(what)


def test_a_tensor_of_the_cpu_has_a_reason_of_its_own() -> None:
    """Such a step would not run on a GPU either."""
    with pytest.raises(NotSimulatedError, match=r"Raises '0' uses a tensor on the CPU together"):
        run(lambda data: data + torch.zeros(3))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@torch.compile
def compiled_function(data: torch.Tensor) -> torch.Tensor:
    """Would be compiled at its first call, but nothing calls it."""
    return data.sin()


class CallsCompiled(nn.Linear):
    """Calls a compiled function."""

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return compiled_function(super().forward(data))


class CallsMethod(nn.Linear):
    """Calls a compiled method through a plain one."""

    @torch.compile
    def inner(self, data: torch.Tensor) -> torch.Tensor:
        return super().forward(data)

    def outer(self, data: torch.Tensor) -> torch.Tensor:
        return self.inner(data)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.outer(data)


class IsCompiled(nn.Linear):
    """Has a compiled forward."""

    @torch.compile
    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return super().forward(data)


def compiled_in_place() -> nn.Module:
    model = net()
    model[0].compile()
    return model


def compiled_step() -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net().parameters())
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (torch.compile(net()), "OptimizedModule is compiled"),
        (
            nn.ModuleList([cast("nn.Module", torch.compile(net()))]),
            "OptimizedModule '0' is compiled",
        ),
        (compiled_in_place(), "Linear '0' is compiled"),
        (IsCompiled(4, 4), "IsCompiled is compiled"),
        (CallsCompiled(4, 4), "CallsCompiled calls compiled_function, which is compiled"),
        (CallsMethod(4, 4), "CallsMethod calls inner, which is compiled"),
        (compiled_function, "it is compiled"),
        (compiled_step(), "SGD is compiled"),
    ],
)
def test_what_is_compiled_is_refused(part: Any, words: str) -> None:
    """The compiled part may be anywhere; the message says what to do."""
    with pytest.raises(NotSimulatedError, match=f"{words}.*memfit rehearse"):
        refuse_compiled(net(), part, name="Net")


@pytest.mark.parametrize("name", ["SGD", "LBFGS", "SparseAdam", "Adafactor", "Adam"])
def test_what_is_not_compiled_is_not_refused(name: str) -> None:
    """torch marks its optimizers as never to be compiled, and that is no compiled part."""
    make = getattr(torch.optim, name)
    refuse_compiled(
        net(), nn.functional.cross_entropy, make(net().parameters(), lr=0.1), make, name="Net"
    )


def test_sparse_gradients_are_refused() -> None:
    """The message has the embedding's name; a dense embedding is not refused."""
    refuse_sparse(nn.Sequential(nn.Embedding(3, 2)), name="Net")
    with pytest.raises(NotSimulatedError, match=r"EmbeddingBag '0' makes sparse gradients"):
        refuse_sparse(nn.Sequential(nn.EmbeddingBag(3, 2, sparse=True)), name="Net")
