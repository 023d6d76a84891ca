"""Profiles of real steps on a GPU, from the allocator's recorded history."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memfit
from memfit import Source
from memfit.cards import is_rehearsed
from memfit.records import Role


@pytest.mark.gpu
def test_a_recorded_history_is_explained(tmp_path: Path) -> None:
    """Roles are known, the peak is the allocator's, and advice is simulated for the card."""
    path = tmp_path / "out.pickle"
    profile = memfit.profile(
        "test_vit.r160_in1k", 64, device="cuda", precision="amp-bf16", snapshot=path
    )
    assert profile.source is (Source.REHEARSED if is_rehearsed() else Source.MEASURED)
    # 64 images: on Hopper, cuBLAS keeps two workspaces of 32 MiB.
    assert profile.peak.bytes_of(Role.ACTIVATIONS) > profile.peak.bytes_of(Role.WORKSPACES)
    assert profile.peak.bytes_of(Role.PARAMETERS) > 0
    assert profile.peak.bytes_of(Role.OPTIMIZER_STATE) > 0
    assert "(unknown)" not in {block.module for block in profile.blocks}
    assert [phase.name for phase in profile.timeline.phases] == ["forward", "backward", "optimizer"]
    assert profile.cards[0].gpu == torch.cuda.get_device_name()
    assert path.stat().st_size > 10_000


@pytest.mark.gpu
def test_the_simulation_agrees_with_the_history() -> None:
    """Activations, most of the peak, are within 5% of the simulated ones."""
    options = {"precision": "amp-bf16", "image_size": 160}
    real = memfit.profile("test_vit.r160_in1k", 64, device="cuda", **options)  # type: ignore[arg-type]
    name = torch.cuda.get_device_name()
    model = memfit.profile("test_vit.r160_in1k", 64, gpu=name, **options)  # type: ignore[arg-type]
    expected = real.peak.bytes_of(Role.ACTIVATIONS)
    assert model.peak.bytes_of(Role.ACTIVATIONS) == pytest.approx(expected, rel=0.05)
