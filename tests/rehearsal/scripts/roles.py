"""Trains a layer in autocast, with an average of its weights, and keeps what others drop."""

from __future__ import annotations

import copy

import torch
from torch import nn


def main() -> None:
    model = nn.Linear(1024, 1024, bias=False).cuda()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(8):
        x = torch.ones(2048, 1024, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            # The results and the gradients of the step before are freed here.
            results = model(x)
        optimizer.zero_grad()
        results.float().mean().backward()
        optimizer.step()
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 0.1)


if __name__ == "__main__":
    main()
