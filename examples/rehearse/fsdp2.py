"""Train on several GPUs with FSDP2: parameters, gradients and optimizer state in shards.

memfit rehearse --gpu "RTX 4090" -- torchrun --nproc-per-node 2 examples/rehearse/fsdp2.py
"""

from __future__ import annotations

import argparse
import os

import timm
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

STEPS = 12


def main() -> None:
    """Train for a dozen steps, one process for each GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    try:
        for _ in range(STEPS):
            images = torch.randn(options.batch_size, 3, 224, 224, device=device)
            targets = torch.randint(10, (options.batch_size,), device=device)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
