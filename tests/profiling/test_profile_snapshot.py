"""Simulated histories in PyTorch's viewers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch.cuda import _memory_viz

import memfit
from memfit import Precision, StepOptions
from memfit.cards import find_gpu
from memfit.errors import UsageError
from memfit.profiling import profile_gpu
from memfit.step.training_step import TrainingStep

RTX3090 = find_gpu("rtx3090")
STEP = TrainingStep(
    subject="test_vit.r160_in1k",
    options=StepOptions(precision=Precision.AMP_BF16, optimizer="adamw", image_size=(96, 96)),
)


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_pytorchs_viewer_reads_a_simulated_snapshot(
    monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    """Every view of torch.cuda._memory_viz reads it, and shows the profile's figures."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", settings)
    profiled = profile_gpu(STEP, 4, RTX3090, keeps_history=True)
    profile, snapshot = profiled.profile, profiled.snapshot
    assert snapshot is not None
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot  # noqa: S301 - just written
    reserved = sum(segment["total_size"] for segment in snapshot["segments"])
    assert reserved == profile.peak.reserved_bytes
    for segment in snapshot["segments"]:
        assert segment["total_size"] == sum(block["size"] for block in segment["blocks"])
    assert f"segments: {len(snapshot['segments'])}" in _memory_viz.segsum(snapshot)
    assert "<script" in _memory_viz.trace_plot(snapshot)
    assert "<script" in _memory_viz.segment_plot(snapshot)
    assert "cudaMalloc" in _memory_viz.trace({**snapshot, "segments": []})
    drawn: list[str] = []
    _memory_viz.memory(snapshot, format_flamegraph=drawn.append)
    assert "[parameters] in" in drawn[0]


def test_the_history_agrees_with_its_own_segments() -> None:
    """Replaying all events ends with the blocks that the segments have."""
    snapshot = profile_gpu(STEP, 4, RTX3090, keeps_history=True).snapshot
    assert snapshot is not None
    live: dict[int, int] = {}
    segments: dict[int, int] = {}
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "alloc":
            assert entry["addr"] not in live
            live[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_completed":
            assert live.pop(entry["addr"]) == entry["size"]
        elif entry["action"] == "segment_alloc":
            segments[entry["addr"]] = entry["size"]
    in_segments = {
        block["address"]: block["size"]
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    assert live == in_segments
    assert segments == {s["address"]: s["total_size"] for s in snapshot["segments"]}


def test_a_cpu_has_no_snapshot(tmp_path: Path) -> None:
    """A CPU has no caching allocator."""
    with pytest.raises(UsageError, match="no caching allocator"):
        memfit.profile(
            "test_vit.r160_in1k",
            1,
            device="cpu",
            image_size=96,
            snapshot=tmp_path / "out.pickle",
        )
