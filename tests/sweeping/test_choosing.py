"""A choice for a known case: what the fast.ai course found by hand."""

from __future__ import annotations

import memfit

# The lesson "Road to the Top", part 3 (2022): 64 samples in each optimizer step, fp16, 10 classes.
# On its cards of 16 GiB the large models needed accumulation, and convnext_small did not.
LARGE = (
    "convnext_large@224",
    "convnext_large@320x240",
    "vit_large_patch16_224@224",
    "swinv2_large_window12_192@192",
    "swin_large_patch4_window7_224@224",
)
SMALL = "convnext_small@128"


def test_the_road_to_the_top_on_a_smaller_card() -> None:
    """Without a run, the same models on the same sizes: the large ones accumulate, all exactly."""
    found = memfit.choose(
        [*LARGE, SMALL],
        gpu="rtx3060",
        effective_batch_size=64,
        precision="amp-fp16",
        optimizer="adam",
        num_classes=10,
        progress=None,
    )
    assert found.device == "NVIDIA GeForce RTX 3060"
    rows = {
        f"{row.model.partition('.')[0]}@{'x'.join(map(str, row.options.image_size or ()))}": row
        for row in found.rows
    }
    whole = rows.pop(SMALL)
    assert whole.micro_batch_sizes == (64,)
    assert whole.is_exact is None
    assert set(rows) == set(LARGE)
    for name, row in rows.items():
        # The course needed two steps on 16 GiB. On 12 GiB, wider images and the ViT need three.
        most_steps = 3 if name in {LARGE[1], LARGE[2]} else 2
        assert row.accumulation_steps == most_steps, name
        assert sum(row.micro_batch_sizes or ()) == 64
        assert row.is_exact is True
        # With checkpointing, each fits whole.
        assert row.checkpointed_micro_batch_size == 64
