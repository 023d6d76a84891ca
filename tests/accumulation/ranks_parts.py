"""What the cases of `two_ranks.py` share: a net, its data, and what both ranks must hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.nn.parallel import DistributedDataParallel

from accumulation.parts import full_batch_gradients


class Net(nn.Module):
    """Mixes no samples; one rank alone uses one part of it, and no rank uses another part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 4))
        self.first_ranks = nn.Linear(5, 4)
        self.nobodys = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 4)."""
        # Each sample says which rank it belongs to.
        scores: torch.Tensor = self.body(x)
        return scores + self.first_ranks(x) if x[0, 0] > 0 else scores


def data(sizes: tuple[int, int]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Any]:
    """Return the batch of each rank, and the whole batch."""
    torch.manual_seed(5)
    shares = []
    for rank, size in enumerate(sizes):
        x, y = torch.randn(size, 5).double(), torch.randint(4, (size,))
        x[:, 0] = 1 - 2 * rank
        y[: size // 3 + rank] = -100
        shares.append((x, y))
    return shares, shares


def mean_over_all(model: Net, shares: list[Any], *, over: str) -> torch.Tensor:
    """Return the loss of the whole effective batch, computed in one process."""
    outputs = torch.cat([model(x) for x, _ in shares])
    targets = torch.cat([y for _, y in shares])
    if over == "targets":
        return F.cross_entropy(outputs, targets)
    total = F.cross_entropy(outputs, targets, reduction="sum")
    return total if over == "sum" else total / len(targets)


def whole_batch(
    sizes: tuple[int, int], *, over: str = "targets"
) -> tuple[Net, list[Any], list[torch.Tensor | None]]:
    """Return a net, the batch of each rank, and the gradients of the whole batch in one process."""
    torch.manual_seed(0)
    reference = Net().double()
    shares, _ = data(sizes)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    whole_loss = functools.partial(mean_over_all, reference, shares, over=over)
    return reference, shares, full_batch_gradients(reference, optimizer, whole_loss)


def loss_over(over: str) -> Callable[..., torch.Tensor]:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if over == "targets":
            return F.cross_entropy(outputs, targets)
        total = F.cross_entropy(outputs, targets, reduction="sum")
        return total if over == "sum" else total / len(targets)

    return loss


def together(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    both = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(both, tensor.contiguous())
    return both


def assert_same_on_both(tensors: list[torch.Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None:
            one, other = gathered(tensor)
            assert torch.equal(one, other)


WEIGHTS: dict[str, Any] = {
    "samples": "samples",
    "targets": lambda batch: (batch[1] != -100).sum(),
    "sum": "sum",
}


def whole_loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)
