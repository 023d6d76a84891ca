"""Train a timm model with PyTorch alone: mixed precision, and a validation after each epoch.

memfit rehearse --gpu "RTX 4090" -- python examples/rehearse/plain_pytorch.py --batch-size 128
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch.nn import functional

EPOCHS = 2
BATCHES = 8


def main() -> None:
    """Train for two short epochs on images that are noise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=128)
    options = parser.parse_args()

    device = torch.device("cuda")
    model = timm.create_model("resnet18", num_classes=10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    for epoch in range(EPOCHS):
        model.train()
        for _ in range(BATCHES):
            images = torch.randn(shape, device=device)
            targets = torch.randint(10, (options.batch_size,), device=device)
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            scores = model(torch.randn(shape, device=device))
        print(f"epoch {epoch}: loss {loss.item():.4f}, scores {tuple(scores.shape)}")


if __name__ == "__main__":
    main()
