"""Train a timm model with Lightning's `Trainer`, in bf16-mixed.

memfit rehearse --gpu "RTX 4090" -- python examples/rehearse/lightning_trainer.py --batch-size 128
"""

from __future__ import annotations

import argparse
from typing import Any

import pytorch_lightning as lightning
import timm
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

SAMPLES = 1 << 20


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """Small images that are noise."""

    def __len__(self) -> int:
        """Return more than any batch."""
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return an image and its class."""
        return torch.zeros(3, 64, 64), index % 10


class Classifier(lightning.LightningModule):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, patch_size=4, num_classes=10
        )

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, targets = batch
        loss = functional.cross_entropy(self.model(images), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train for a dozen steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    trainer = lightning.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=12,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Classifier(), DataLoader(Noise(), batch_size=options.batch_size))


if __name__ == "__main__":
    main()
