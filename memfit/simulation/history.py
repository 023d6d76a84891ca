"""Reads what a real allocator recorded, in PyTorch's format, and compares it with a replay.

`torch.cuda.memory._record_memory_history` records every request and every segment that is taken
from the device. This module reads such a history, both to profile a GPU and to test the simulation.
`disagreement` replays the requests. It returns the first request after which the replay has
reserved other bytes. It replays one device and one stream. This module does not use torch.

Source: the docstring of `_snapshot` in torch/cuda/memory.py, and torch/cuda/_memory_viz.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from memfit.errors import UsageError
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings

__all__ = [
    "Disagreement",
    "Frame",
    "HistoryEntry",
    "Resident",
    "disagreement",
    "events_of",
    "read_history",
    "read_residents",
    "segment_bytes",
]

_TAKEN: Final = {Action.SEGMENT_ALLOC: 1, Action.SEGMENT_MAP: 1}
_GIVEN_BACK: Final = {Action.SEGMENT_FREE: -1, Action.SEGMENT_UNMAP: -1}
_SIGNS: Final = _TAKEN | _GIVEN_BACK
_KEPT: Final = {
    action.value: action for action in (Action.ALLOC, Action.FREE_COMPLETED, Action.OOM, *_SIGNS)
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A line of a recorded stack."""

    name: str
    filename: str
    line: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One event that an allocator recorded.

    Args:
        time_ns: Its time, in nanoseconds since 1970; 0 if it is not known.
        action: What happened.
        address: The address of the block or segment.
        num_bytes: Its size.
        stream: Its stream.
        frames: The lines of the program that led to it, the innermost first.
    """

    time_ns: int = 0
    action: Action
    address: int
    num_bytes: int
    stream: int = 0
    frames: tuple[Frame, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A block that existed when the recording began.

    Args:
        address: Its address.
        held_bytes: Bytes that the allocator had handed out.
        requested_bytes: Bytes that were requested.
    """

    address: int
    held_bytes: int
    requested_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Where a replay first differs from what was recorded.

    Args:
        index: The index of the event.
        event: The event.
        recorded_bytes: Bytes that the real allocator had reserved after the event.
        replayed_bytes: Bytes that the replay had reserved after the event.
    """

    index: int
    event: Event
    recorded_bytes: int
    replayed_bytes: int


def read_history(
    entries: Iterable[Mapping[str, Any]], *, since_ns: int = 0
) -> tuple[HistoryEntry, ...]:
    """Read one device's history.

    Args:
        entries: `torch.cuda.memory._snapshot()["device_traces"][device]`.
        since_ns: Earlier entries are left out. In nanoseconds since 1970.

    Returns:
        Every allocation and free, and every segment that was taken from the device or given back,
        in the order of recording.
    """
    return tuple(
        HistoryEntry(
            time_ns=entry.get("time_us", 0) * 1000,
            action=_KEPT[entry["action"]],
            address=entry.get("addr", entry.get("device_free", 0)),
            num_bytes=entry["size"],
            stream=entry.get("stream", 0),
            frames=tuple(
                Frame(name=frame["name"], filename=frame["filename"], line=frame["line"])
                for frame in entry.get("frames") or ()
            ),
        )
        for entry in entries
        if entry["action"] in _KEPT and entry.get("time_us", 0) * 1000 >= since_ns
    )


def read_residents(
    segments: Iterable[Mapping[str, Any]], *, device_index: int
) -> tuple[tuple[Resident, ...], int]:
    """Read what a device's allocator holds.

    Args:
        segments: `torch.cuda.memory._snapshot()["segments"]`.
        device_index: The index of the device.

    Returns:
        The blocks in use, and the number of reserved bytes.
    """
    own = [segment for segment in segments if segment["device"] == device_index]
    residents = []
    for segment in own:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                residents.append(
                    Resident(
                        address=address,
                        held_bytes=block["size"],
                        requested_bytes=block.get("requested_size", block["size"]),
                    )
                )
            address += block["size"]
    return tuple(residents), sum(segment["total_size"] for segment in own)


def segment_bytes(action: Action, num_bytes: int) -> int:
    """Return by how many bytes an action changes the reserved memory."""
    return _SIGNS.get(action, 0) * num_bytes


def events_of(history: Iterable[HistoryEntry]) -> tuple[Event, ...]:
    """Return a history as events that can be replayed. An allocation's id is its address.

    Raises:
        UsageError: The history has more than one stream.
    """
    kept = tuple(history)
    streams = {entry.stream for entry in kept}
    if len(streams) > 1:
        raise UsageError(f"The history has {len(streams)} streams, and one can be replayed.")
    return tuple(
        Event(action=entry.action, id=entry.address, num_bytes=entry.num_bytes) for entry in kept
    )


def disagreement(
    events: Sequence[Event],
    *,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
) -> Disagreement | None:
    """Replay the requests of a history, and compare the reserved bytes after each one.

    Args:
        events: A history that began with an empty allocator.
        settings: The options that the real allocator ran with.
        capacity_bytes: Bytes that the real allocator could reserve; `None` if it never ran out.

    Returns:
        The first difference; `None` if there is no difference.
    """
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, settings=settings)
    recorded = 0
    for index, event in enumerate(events):
        recorded += segment_bytes(event.action, event.num_bytes)
        try:
            allocator.carry_out(event.action, event.id, event.num_bytes)
            fits = True
        except AllocatorOutOfMemoryError:
            fits = False
        replayed = allocator.stats.reserved_bytes
        if event.action is Action.ALLOC and (replayed != recorded or not fits):
            return Disagreement(
                index=index, event=event, recorded_bytes=recorded, replayed_bytes=replayed
            )
    return None
