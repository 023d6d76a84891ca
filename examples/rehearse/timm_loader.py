"""Train with timm's own loader: worker processes, images as bytes, a prefetcher on a side stream.

memfit rehearse --gpu "RTX 4090" -- python examples/rehearse/timm_loader.py --batch-size 128
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torchvision.datasets import FakeData

BATCHES = 8


def main() -> None:
    """Train for one short epoch, with a scaler and a moving average of the weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", default="resnet50")
    options = parser.parse_args()
    device = torch.device("cuda")
    loader = create_loader(
        FakeData(BATCHES * options.batch_size, (3, 224, 224), num_classes=10),
        input_size=(3, 224, 224),
        batch_size=options.batch_size,
        is_training=True,
        num_workers=2,
        device=device,
    )
    model = timm.create_model(options.model, num_classes=10).to(device)
    average = ModelEmaV3(model)
    optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-3)
    scaler = NativeScaler()
    loss_function = torch.nn.CrossEntropyLoss()
    for number, (images, targets) in enumerate(loader):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_function(model(images), targets)
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        optimizer.zero_grad()
        average.update(model, step=number)
    print(f"trained on {len(loader)} batches")


if __name__ == "__main__":
    main()
