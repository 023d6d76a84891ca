"""Road to the Top, part 3: the accumulation steps of five architectures, found without a run.

    python examples/road_to_the_top.py

fast.ai's course (2022, lesson 7) trained these models on cards of 16,280 MiB in fp16 mixed
precision with Adam, 10 classes and 64 samples in each optimizer step. The course found the number
of accumulation steps by hand, one run after another. Here the steps are simulated. Attention is not
fused, because it was not fused in 2022.
"""

from __future__ import annotations

import time

from timm.layers import set_fused_attn

import memfit
from memfit.units import format_bytes

EFFECTIVE_BATCH = 64
# The model, its images, and the accumulation steps that the course found.
CONFIGURATIONS = (
    ("convnext_large", "224", "2"),
    ("convnext_large", "320x240", "2"),
    ("vit_large_patch16_224", "224", "2"),
    ("swinv2_large_window12_192", "192", "2"),
    ("swin_large_patch4_window7_224", "224", "2"),
    ("convnext_small", "128", "1"),
)


def plan(model: str, image_size: str) -> memfit.Plan:
    """Return the fewest steps that fit the course's card, with nothing kept free."""
    return memfit.plan(
        model,
        EFFECTIVE_BATCH,
        gpu="p100",
        memory="16280MiB",
        precision="amp-fp16",
        optimizer="adam",
        num_classes=10,
        image_size=image_size,
        headroom=0,
    )


def main() -> None:
    """Print a row for each configuration."""
    set_fused_attn(False)
    start = time.perf_counter()
    print(f"{'model':<30} {'px':>7}  {'steps':>5}  {'course':>6}  {'peak':>9}  of")
    try:
        for model, image_size, course in CONFIGURATIONS:
            planned = plan(model, image_size)
            peak, usable = planned.peak_reserved_bytes or 0, planned.capacity.usable_bytes
            print(
                f"{model:<30} {image_size:>7}  {planned.accumulation_steps:>5}  {course:>6}  "
                f"{format_bytes(peak):>9}  {format_bytes(usable)}"
                f"{'  (borderline)' * (peak > 0.94 * usable)}"
            )
    finally:
        set_fused_attn(True)
    print(f"Simulated for a card of 16,280 MiB in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
