"""Wildcards with a mistake, and the one that was meant."""

from __future__ import annotations

import pytest

from memfit.sweeping.wildcards import nearest_pattern

NAMES = (
    "convnext_base", "convnext_tiny", "efficientnet_b0", "rdnet_base", "resnet18", "resnet50",
    "resnext50_32x4d", "vit_base_patch16_224", "vit_tiny_patch16_224",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("resnt*", "resnet*"),
        ("ResNet*", "resnet*"),
        ("*resnt*", "*resnet*"),
        ("rsnet*", "resnet*"),
        ("vti_*", "vit_*"),
        ("convnxt_*", "convnext_*"),
        ("convnexxt_*", "convnext_*"),
        ("vit_*_pathc16*", "vit_*_patch16*"),
        ("resnet9[08]", "resnet1[08]"),
        ("efficientnet_b?x", "efficientnet_b?"),
    ],
)
def test_the_fewest_letters_are_changed(given: str, meant: str) -> None:
    """A letter was missing, too many, another, or in the wrong place. Wildcards stay."""
    assert nearest_pattern(given, NAMES) == meant


@pytest.mark.parametrize("given", ["zzzz*", "gpt2*", "resnet*_in1k", "unet"])
def test_nothing_is_named_that_is_not_near(given: str) -> None:
    """One letter of four may be wrong."""
    assert nearest_pattern(given, NAMES) is None
