"""Collaborative filtering without images: ratings from two embeddings and two biases.

    python examples/collaborative_filtering.py

Measures what fits a limit on the CPU, and trains on 8,000 ratings in each optimizer step.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

import memfit

NUM_USERS, NUM_ITEMS, NUM_FACTORS = 2000, 1000, 512
EFFECTIVE_BATCH = 8000
LOWEST, HIGHEST = 0.0, 5.5


class DotProductBias(nn.Module):
    """Rates an item by a user with the dot product of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.user_factors = nn.Embedding(NUM_USERS, NUM_FACTORS)
        self.item_factors = nn.Embedding(NUM_ITEMS, NUM_FACTORS)
        self.user_bias = nn.Embedding(NUM_USERS, 1)
        self.item_bias = nn.Embedding(NUM_ITEMS, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Return ratings of shape (samples,) for users and items of shape (samples,)."""
        match = (self.user_factors(users) * self.item_factors(items)).sum(1)
        bias = self.user_bias(users) + self.item_bias(items)
        return torch.sigmoid(match + bias.squeeze(1)) * (HIGHEST - LOWEST) + LOWEST


def make_model() -> nn.Module:
    """Return the model."""
    return DotProductBias()


def make_batch(num_samples: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return users, items, and the rating of each item by its user."""
    users = torch.randint(NUM_USERS, (num_samples,))
    items = torch.randint(NUM_ITEMS, (num_samples,))
    return (users, items), torch.rand(num_samples) * HIGHEST


def loss(ratings: torch.Tensor, true_ratings: torch.Tensor) -> torch.Tensor:
    """Average over the samples."""
    return F.mse_loss(ratings, true_ratings)


def main() -> None:
    """Plan, and train a few steps."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    workload = memfit.Workload(model, make_batch, loss, optimizer)
    plan = memfit.plan(workload, EFFECTIVE_BATCH, device="cpu", memory="70MiB", multiple_of=100)
    print(f"{EFFECTIVE_BATCH} = {' + '.join(map(str, plan.micro_batch_sizes))}")
    accumulator = memfit.Accumulator(model, optimizer, plan, loss=loss)
    for step in range(3):
        print(f"step {step}: loss {accumulator.step(make_batch(EFFECTIVE_BATCH)):.3f}")


if __name__ == "__main__":
    main()
