"""What `Accumulator.step` costs over a loop written by hand.

    python benchmarks/accumulator.py

One process takes the same optimizer steps of vit_tiny at 64 px on the CPU in turn: by hand, and by
Accumulator with and without recovery. Prints the ratio of the medians. The seconds are those of the
processor, so other processes on the machine do not add to them. The last column compares the loop
by hand with itself, so it shows the noise.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from memfit import Accumulator

CASES = (("vit_tiny_patch16_224", 64), ("resnet10t", 64))


Loop = Callable[[torch.Tensor, torch.Tensor], object]


def loops_of(name: str, image_size: int, micro: int) -> dict[str, Loop]:
    """Return functions of images and classes that take an optimizer step of the same model."""
    kwargs = {"img_size": image_size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=10, **kwargs).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def by_hand(images: torch.Tensor, classes: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(images), micro):
            x, y = images[start : start + micro], classes[start : start + micro]
            (F.cross_entropy(model(x), y) * (len(x) / len(images))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def accumulated(*, recover: bool) -> Loop:
        accumulator = Accumulator(
            model, optimizer, micro, loss=F.cross_entropy, clip_grad_norm=1.0, recover=recover
        )
        return lambda images, classes: accumulator.step((images, classes))

    return {
        "by hand": by_hand,
        "without recovery": accumulated(recover=False),
        "with recovery": accumulated(recover=True),
        "by hand again": by_hand,
    }


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.batch} images in micro-batches of {arguments.micro}, AdamW, clipped; "
        f"{arguments.steps} steps of each in turn; {platform.machine()}, {os.cpu_count()} CPU "
        f"cores, {arguments.threads} threads, torch {torch.__version__}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print("| model | px | CPU s/step by hand | without recovery | with recovery | by hand again |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, image_size in CASES:
        images = torch.randn(arguments.batch, 3, image_size, image_size)
        classes = torch.randint(10, (arguments.batch,))
        loops = loops_of(name, image_size, arguments.micro)
        seconds: dict[str, list[float]] = {how: [] for how in loops}
        for step in range(arguments.steps + 3):
            # The order changes each time, because a step may leave the cache warm for the next.
            for how in random.sample(list(loops), len(loops)):
                start = time.process_time()
                loops[how](images, classes)
                if step >= 3:  # noqa: PLR2004 - the first ones warm up
                    seconds[how].append(time.process_time() - start)
        by_hand = statistics.median(seconds.pop("by hand"))
        ratios = [f"{statistics.median(taken) / by_hand:.3f}" for taken in seconds.values()]
        print(f"| {name} | {image_size} | {by_hand:.3f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
