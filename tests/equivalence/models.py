"""Small models with a fault, for the tests of equivalence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from memfit.equivalence import AccumulationLoop, verify
from memfit.records import Equivalence, Precision, StepOptions
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

WIDTH = 12
NUM_CLASSES = 5


class Sorting(nn.Module):
    """Sorts samples by a value, as a mixture of experts does, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = x[:, 0].argsort()
        result: torch.Tensor = self.inner(x[order])[order.argsort()]
        return result


class HandWrittenNorm(nn.Module):
    """Batch normalisation under a name that no list contains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.mean: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return (x - self.mean) * self.gain
        mean = x.mean(dim=0)
        self.mean.lerp_(mean.detach(), 0.1)
        return (x - mean) / (x.std(dim=0) + 1e-3) * self.gain


class Detaching(nn.Module):
    """A layer that lets no gradient through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2


class DetachingLater(nn.Module):
    """A layer that lets only the first micro-batch's gradient through."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x if self.calls == 1 else x.detach()


class Counting(nn.Module):
    """A layer whose output grows with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


class OnePercentOff(nn.Linear):
    """A layer whose weight gets 1% too much gradient from small batches, only under autocast."""

    whole = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and len(x) < self.whole:
            weight = _ScaledGradient.apply(weight, 1.01)
        return F.linear(x, weight, self.bias)


class _TimesSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * len(grads[0])


class TimesSamples(nn.Module):
    """Multiplies gradients by the batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _TimesSamples.apply(x)  # type: ignore[no-any-return]


class _MixedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] - grads[0].mean(dim=0)


class MixingInBackward(nn.Module):
    """A layer that centres the batch's gradients and does not change its outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _MixedGradient.apply(x)  # type: ignore[no-any-return]


def mlp(*middle: nn.Module) -> nn.Sequential:
    """Return a small classifier of vectors with a given layer in its middle."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), *middle, nn.Linear(WIDTH, NUM_CLASSES))


def vectors(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random vectors of shape (batch_size, WIDTH) and classes of shape (batch_size,)."""
    return torch.randn(batch_size, WIDTH), torch.randint(NUM_CLASSES, (batch_size,))


def check(
    model: nn.Module,
    loss: Any = F.cross_entropy,
    batch: Any = vectors,
    *,
    precision: Precision = Precision.FP32,
    micro_batch_size: int = 4,
    accumulation_steps: int = 3,
    freeze_bn: bool = False,
    samples: int | None = None,
    accumulate: AccumulationLoop | None = None,
) -> Equivalence:
    """Verify a model as a user would."""
    workload = Workload(model, batch, loss, "sgd")
    return verify(
        TrainingStep(subject=workload, options=StepOptions(precision=precision)),
        torch.device("cpu"),
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        freeze_bn=freeze_bn,
        samples=samples,
        accumulate=accumulate,
    )


def token_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over the targets that are not ignored."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class TokenModel(nn.Module):
    """Gives scores (samples, tokens, classes) for integers of shape (samples, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(tokens)))  # type: ignore[no-any-return]


class Rolled(nn.Module):
    """Mixup of neighbours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.6 * x + 0.4 * x.roll(1, 0)


def fp64_error(result: Equivalence) -> float:
    """Return the largest relative error of the float64 check, which must be there."""
    error = result.worst_relative_error("fp64")
    assert error is not None
    return error


def sentences(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded sentences of up to 8 tokens, with targets that ignore the padding."""
    tokens = torch.randint(20, (batch_size, 8))
    targets = torch.randint(NUM_CLASSES, (batch_size, 8))
    for sample in range(batch_size):
        targets[sample, 1 + sample % 7 :] = -100
    return tokens, targets


__all__ = [
    "NUM_CLASSES",
    "WIDTH",
    "Counting",
    "Detaching",
    "DetachingLater",
    "HandWrittenNorm",
    "MixingInBackward",
    "OnePercentOff",
    "Rolled",
    "TokenModel",
    "check",
    "fp64_error",
    "mlp",
    "sentences",
    "token_loss",
    "vectors",
]
