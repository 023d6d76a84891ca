"""Train a timm model with a fastai `Learner`, in mixed precision, with its validation.

memfit rehearse --gpu "RTX 4090" -- python examples/rehearse/fastai_learner.py --batch-size 128
"""

from __future__ import annotations

import argparse

import timm
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

BATCHES = 8


class Noise:
    """Small images that are noise.

    Args:
        num_samples: How many.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        """Return how many there are."""
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an image and its class."""
        return torch.zeros(3, 64, 64), torch.tensor(index % 10)


def main() -> None:
    """Train for one short epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    device = torch.device("cuda")
    size = options.batch_size
    loaders = DataLoaders(
        DataLoader(Noise(BATCHES * size), bs=size, shuffle=True, num_workers=0),
        DataLoader(Noise(size), bs=size, num_workers=0),
        device=device,
    )
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=4, num_classes=10)
    learner = Learner(
        loaders, model.to(device), loss_func=nn.CrossEntropyLoss(), cbs=[MixedPrecision()]
    )
    learner.fit(1, 1e-3)


if __name__ == "__main__":
    main()
