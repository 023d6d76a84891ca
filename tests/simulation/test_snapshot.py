"""Recorded histories, in PyTorch's format, beside the replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memfit.errors import UsageError
from memfit.records import Action
from memfit.simulation.snapshot import disagreement, load, read_history, save
from memfit.units import MIB

FIXTURES = sorted((Path(__file__).parent.parent / "data").glob("history-*.json.gz"))


def entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    """One entry as `torch.cuda.memory._snapshot` has it."""
    return {"action": action, "addr": address, "size": size, "stream": stream, "frames": []}


HISTORY = (
    entry("segment_alloc", 1000, 20 * MIB),
    entry("alloc", 1000, 3 * MIB),
    entry("alloc", 2000, 5 * MIB),
    entry("free_requested", 1000, 3 * MIB),
    entry("free_completed", 1000, 3 * MIB),
    {"action": "snapshot", "addr": 0, "size": 0, "stream": 0},
    entry("segment_alloc", 9000, 30 * MIB),
    entry("alloc", 9000, 30 * MIB - 100),
    entry("alloc", 1000, 2 * MIB),
)


def test_a_history_agrees_with_its_replay() -> None:
    """The same segments are taken for the same requests."""
    events = read_history(HISTORY)
    assert [event.action for event in events].count(Action.ALLOC) == 4
    assert disagreement(events) is None


def test_a_disagreement_is_located() -> None:
    """Where the real allocator took another segment, that event is named."""
    wrong = (*HISTORY[:6], entry("segment_alloc", 9000, 40 * MIB), *HISTORY[7:])
    found = disagreement(read_history(wrong))
    assert found is not None
    assert (found.recorded_bytes, found.replayed_bytes) == (60 * MIB, 50 * MIB)
    assert found.event.num_bytes == 30 * MIB - 100
    short = disagreement(read_history(HISTORY), capacity_bytes=24 * MIB)
    assert short is not None
    assert short.event.id == 9000


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A compact file replays the same."""
    path = tmp_path / "history.json.gz"
    save(read_history(HISTORY), path)
    assert disagreement(load(path)) is None
    assert path.stat().st_size < 300


def test_one_stream_only() -> None:
    """Pools are per stream, and the replay has one."""
    with pytest.raises(UsageError, match="2 streams"):
        read_history((*HISTORY, entry("alloc", 5, 512, stream=7)))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_recorded_histories_replay_event_by_event(path: Path) -> None:
    """What a real GPU reserved, after every request (`benchmarks/gpu_truth.py` records them)."""
    assert disagreement(load(path)) is None
