"""Starts processes of every kind that use the card, and loads data in forked workers."""

from __future__ import annotations

import multiprocessing

import torch
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, TensorDataset

MIB = 1 << 20


def train(rank: int, mebibytes: int) -> None:
    """Take a step whose gradient needs this much memory."""
    weight = nn.Parameter(torch.ones((rank + 1) * mebibytes * MIB // 4, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(8):
        weight.mul(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    numbers = TensorDataset(torch.arange(8))
    for (batch,) in DataLoader(numbers, batch_size=4, num_workers=2):
        print("batch", batch.tolist(), flush=True)
    spawn(train, (16,), nprocs=2)
    forked = multiprocessing.get_context("fork").Process(target=train, args=(3, 16))
    forked.start()
    forked.join()
    print("joined", forked.exitcode, flush=True)
    print("x" * (1 << 20) * 100)


if __name__ == "__main__":
    main()
