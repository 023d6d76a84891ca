"""Recorded histories in PyTorch's format are compared with the replay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.errors import UsageError
from memfit.records import Action
from memfit.simulation.allocator.blocks import DeviceMemory
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.history import disagreement, events_of, read_history
from memfit.units import MIB


def entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    """Return one entry in the format of `torch.cuda.memory._snapshot`."""
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
    """Both take the same segments for the same requests."""
    events = events_of(read_history(HISTORY))
    assert [event.action for event in events].count(Action.ALLOC) == 4
    assert disagreement(events) is None


def test_a_disagreement_is_located() -> None:
    """The event at which the real allocator took another segment is named."""
    wrong = (*HISTORY[:6], entry("segment_alloc", 9000, 40 * MIB), *HISTORY[7:])
    found = disagreement(events_of(read_history(wrong)))
    assert found is not None
    assert (found.recorded_bytes, found.replayed_bytes) == (60 * MIB, 50 * MIB)
    assert found.event.num_bytes == 30 * MIB - 100
    short = disagreement(events_of(read_history(HISTORY)), capacity_bytes=24 * MIB)
    assert short is not None
    assert short.event.id == 9000


def test_one_stream_only() -> None:
    """The allocator has a pool for each stream, and the replay has one pool."""
    with pytest.raises(UsageError, match="2 streams"):
        events_of(read_history((*HISTORY, entry("alloc", 5, 512, stream=7))))


class Recording(DeviceMemory):
    """A device that records its segments as PyTorch does."""

    def __init__(self, capacity_bytes: float, history: list[dict[str, Any]], prefix: str) -> None:
        super().__init__(capacity_bytes)
        self._history = history
        self._words = ("map", "unmap") if prefix == "mapped" else ("alloc", "free")

    def take(self, num_bytes: int) -> bool:
        is_taken = super().take(num_bytes)
        if is_taken:
            self._history.append(entry(f"segment_{self._words[0]}", 0, num_bytes))
        return is_taken

    def give_back(self, num_bytes: int) -> None:
        super().give_back(num_bytes)
        self._history.append(entry(f"segment_{self._words[1]}", 0, num_bytes))


@pytest.mark.parametrize("expandable", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    script=st.lists(
        st.tuples(st.booleans(), st.integers(1, 40 * MIB), st.integers(0, 2**16)), max_size=60
    )
)
def test_a_synthetic_history_replays_under_pressure(
    expandable: bool, script: list[tuple[bool, int, int]]
) -> None:
    """Segments of both kinds are taken, freed and taken again, until nothing more fits."""
    options = AllocatorSettings(expandable_segments=expandable)
    history: list[dict[str, Any]] = []
    recorded = CachingAllocator(settings=options)
    recorded._device = Recording(200 * MIB, history, "mapped" if expandable else "")
    live: list[int] = []
    for number, (is_free, num_bytes, choice) in enumerate(script):
        if is_free and live:
            freed = live.pop(choice % len(live))
            recorded.free(freed)
            history.append(entry("free_completed", freed, 0))
            continue
        try:
            recorded.allocate(number, num_bytes)
        except AllocatorOutOfMemoryError:
            break
        history.append(entry("alloc", number, num_bytes))
        live.append(number)
    events = events_of(read_history(history))
    assert disagreement(events, settings=options, capacity_bytes=200 * MIB) is None
