"""One model, two targets: 20 scores, of which 10 are for a disease and 10 for a variety.

    python examples/two_targets.py

The loss function returns two cross-entropies, and Accumulator adds them. The example plans for a
small simulated card, and trains on the CPU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

import memfit

NUM_DISEASES = NUM_VARIETIES = 10
EFFECTIVE_BATCH = 96


def make_model() -> nn.Module:
    """Return a small convolutional network with one head of 20 scores."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, NUM_DISEASES + NUM_VARIETIES),
    )


def make_batch(num_samples: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return images of shape (samples, 3, 64, 64), and a disease and a variety for each."""
    targets = (
        torch.randint(NUM_DISEASES, (num_samples,)),
        torch.randint(NUM_VARIETIES, (num_samples,)),
    )
    return torch.randn(num_samples, 3, 64, 64), targets


def loss(
    scores: torch.Tensor, diseases: torch.Tensor, varieties: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both losses, each averaged over the samples; Accumulator adds them."""
    disease_scores, variety_scores = scores.split((NUM_DISEASES, NUM_VARIETIES), dim=1)
    return F.cross_entropy(disease_scores, diseases), F.cross_entropy(variety_scores, varieties)


def total_loss(scores: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of both losses, because this workload wants one number."""
    return torch.stack(loss(scores, *targets)).sum()


def main() -> None:
    """Plan for a small card, and train a few steps."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    workload = memfit.Workload(model, make_batch, total_loss, optimizer)
    plan = memfit.plan(
        workload, EFFECTIVE_BATCH, gpu="any", memory="560MiB", precision="fp32", multiple_of=4
    )
    print(f"{EFFECTIVE_BATCH} = {' + '.join(map(str, plan.micro_batch_sizes))}")
    accumulator = memfit.Accumulator(model, optimizer, plan, loss=loss)
    for step in range(3):
        print(f"step {step}: loss {accumulator.step(make_batch(EFFECTIVE_BATCH)):.3f}")


if __name__ == "__main__":
    main()
