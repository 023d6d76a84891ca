"""Fine-tune a timm model with an effective batch that does not fit whole.

    python examples/timm_fine_tuning.py

The example measures what fits a limit of 60 MiB on the CPU, plans 64 samples for each optimizer
step, and trains. The weights are random and the images are noise, so nothing is downloaded.
"""

from __future__ import annotations

import logging

import timm
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.data import DataLoader, TensorDataset

import memfit

MODEL = "test_vit.r160_in1k"
IMAGE_SIZE = 96
NUM_CLASSES = 10
EFFECTIVE_BATCH = 64


def make_model() -> nn.Module:
    """Return the model that is fine-tuned."""
    model: nn.Module = timm.create_model(MODEL, num_classes=NUM_CLASSES, img_size=IMAGE_SIZE)
    return model.train()


def make_batch(num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of shape (samples, 3, H, W) and their classes."""
    images = torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE)
    return images, torch.randint(NUM_CLASSES, (num_samples,))


def loss(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Average over the samples."""
    return F.cross_entropy(scores, classes)


def main() -> None:
    """Plan, and train for an epoch."""
    logging.basicConfig(format="%(message)s")
    torch.manual_seed(0)
    plan = memfit.plan(
        MODEL,
        EFFECTIVE_BATCH,
        device="cpu",
        memory="60MiB",
        image_size=IMAGE_SIZE,
        num_classes=NUM_CLASSES,
    )
    print(f"{EFFECTIVE_BATCH} = {' + '.join(map(str, plan.micro_batch_sizes))}")
    for remark in plan.remarks:
        print(remark)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # 160 samples: the last batch of the epoch has only 32, and its weights are right for 32.
    dataset = TensorDataset(*make_batch(160))
    loader = DataLoader(dataset, batch_size=EFFECTIVE_BATCH, shuffle=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(loader))
    accumulator = memfit.Accumulator(
        model, optimizer, plan, loss=loss, scheduler=scheduler, clip_grad_norm=1.0
    )
    for step, batch in enumerate(loader):
        value = accumulator.step(batch)
        print(f"step {step}: {len(batch[0])} samples, loss {value:.3f}")


if __name__ == "__main__":
    main()
