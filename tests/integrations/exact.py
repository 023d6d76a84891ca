"""What the tests of exact accumulation share: a small net, its data, and gradients to compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

SAMPLES, MICRO = 96, 40
NUM_CLASSES = 5
Gradients = list[torch.Tensor]


class Small(nn.Module):
    """A net that mixes no samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16))
        self.out = nn.Linear(16, NUM_CLASSES)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, classes) for features of shape (samples, 6)."""
        if self.training:
            self.sizes.append(len(x))
        scores: torch.Tensor = self.out(self.body(x))
        return scores


def data(num_samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(num_samples, 6, generator=generator),
        torch.randint(NUM_CLASSES, (num_samples,), generator=generator),
    )


@contextlib.contextmanager
def recorded() -> Iterator[list[Gradients]]:
    """Yield a list that gets the gradients of each step of any torch optimizer."""
    steps: list[Gradients] = []

    def record(optimizer: Any, *_: Any) -> None:
        seen = gradients(p for group in optimizer.param_groups for p in group["params"])
        if seen and seen[0].device.type != "meta":  # a plan's own trials
            steps.append(seen)

    handle = register_optimizer_step_post_hook(record)
    try:
        yield steps
    finally:
        handle.remove()


def gradients(parameters: Any) -> Gradients:
    return [p.grad.detach().clone() for p in parameters if p.grad is not None]


def plain(sizes: Sequence[int], *, clip: float | None = None, rate: float = 0.1) -> list[Gradients]:
    """Return the gradients of plain steps of SGD over whole batches of given sizes, in order."""
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    x, y = data(sum(sizes)).tensors
    with recorded() as steps:
        start = 0
        for size in sizes:
            batch = slice(start, start + size)
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            start += size
    return steps


def error(ours: Sequence[Gradients], theirs: Sequence[Gradients]) -> float:
    """Return the largest relative error of a step's gradient, over all parameters together."""
    assert len(ours) == len(theirs) > 0
    pairs = [(flat(one), flat(other)) for one, other in zip(ours, theirs, strict=True)]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def flat(step: Gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in step])
