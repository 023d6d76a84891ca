"""A choice for a known case: what the fast.ai course found by hand."""

from __future__ import annotations

import memfit

# The lesson "Road to the Top", part 3 (2022): 64 samples in each optimizer step, fp16, 10 classes.
# On its cards of 16 GiB the large models needed two steps, and convnext_small needed one.
# tests/test_examples.py has all six configurations on that card. These three stand for them here.
STEPS = {"convnext_large@224": 2, "vit_large_patch16_224@224": 3, "convnext_small@128": 1}


def test_the_road_to_the_top_on_a_smaller_card() -> None:
    """Without a run, the same models on the same sizes: the large ones accumulate, all exactly."""
    found = memfit.choose(
        STEPS,
        gpu="rtx3060",
        effective_batch_size=64,
        precision="amp-fp16",
        optimizer="adam",
        num_classes=10,
        max_steps=2,
        progress=None,
    )
    assert found.device == "NVIDIA GeForce RTX 3060"
    rows = {
        f"{row.model.partition('.')[0]}@{(row.options.image_size or (0,))[0]}": row
        for row in found.rows
    }
    assert {name: row.accumulation_steps for name, row in rows.items()} == STEPS
    # A model that was asked for is in the answer, with the reason why it is not chosen.
    reasons = {name: row.reason for name, row in rows.items() if row.reason}
    assert reasons == {
        "vit_large_patch16_224@224": "it needs 3 accumulation steps, more than 2.",
    }
    for name, row in rows.items():
        assert sum(row.micro_batch_sizes or ()) == 64
        # None of them normalises over the batch, so accumulation is exact where it is needed.
        assert row.is_exact is (True if STEPS[name] > 1 else None)
        # With checkpointing, the large ones fit whole.
        assert row.checkpointed_micro_batch_size == (64 if STEPS[name] > 1 else None)
