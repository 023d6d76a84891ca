"""A loss that averages over tokens, with exact gradients for sequences of different lengths.

    python examples/token_weighted_loss.py

If micro-batches hold different numbers of tokens, the mean of their means is not the mean of the
whole batch. So the weight is a function that counts what the loss averages over. The example has
`Accumulator`, and the same loop with `memfit.micro_batches`. Both give the same gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

import memfit

NUM_WORDS, LENGTH, WIDTH = 50, 24, 32
EFFECTIVE_BATCH = 30
PADDING = -100  # the target that F.cross_entropy ignores


class LanguageModel(nn.Module):
    """Predicts the next word from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(WIDTH, NUM_WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, length, words) for words of shape (samples, length)."""
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1], words.device)
        scores: torch.Tensor = self.head(
            self.layer(self.words(words), src_mask=mask.to(self.head.weight.dtype), is_causal=True)
        )
        return scores


def make_model() -> nn.Module:
    """Return the model."""
    return LanguageModel()


def make_batch(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words and the next ones, both of shape (samples, length), padded."""
    words = torch.randint(NUM_WORDS, (num_samples, LENGTH + 1))
    following = words[:, 1:].clone()
    lengths = torch.randint(1, LENGTH + 1, (num_samples, 1))
    following[torch.arange(LENGTH) >= lengths] = PADDING
    return words[:, :-1], following


def loss(scores: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Average over the words that are not padding."""
    return F.cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=PADDING)


def weight(batch: Any) -> Any:
    """Count what the loss of a batch averages over."""
    _, following = batch
    return (following != PADDING).sum()


def main() -> None:
    """Plan, train a few steps, and compare with a loop that is written out."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    workload = memfit.Workload(model, make_batch, loss, optimizer)
    plan = memfit.plan(
        workload, EFFECTIVE_BATCH, gpu="any", memory="1GiB", precision="fp32", max_batch_size=8
    )
    print(f"{EFFECTIVE_BATCH} = {' + '.join(map(str, plan.micro_batch_sizes))}")
    batch = make_batch(EFFECTIVE_BATCH)
    for micro in memfit.micro_batches(plan, batch, weight=weight):
        words, following = micro.batch
        (loss(model(words), following) * micro.weight).backward()
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.zero_grad()
    loss(model(batch[0]), batch[1]).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    print(f"a loop over micro_batches is off by {(by_hand - whole).norm() / whole.norm():.0e}")
    accumulator = memfit.Accumulator(model, optimizer, plan, loss=loss, weight=weight)
    for step in range(3):
        value = accumulator.step(make_batch(EFFECTIVE_BATCH))
        print(f"step {step}: loss per word {value:.3f}")


if __name__ == "__main__":
    main()
