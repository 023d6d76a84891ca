"""Reads a CUDA allocator's recorded history, in the format of `torch.cuda.memory._snapshot`.

Source: the docstring of `_snapshot` in torch/cuda/memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from memfit.profiling.recorded import RecordedEvent, Resident
from memfit.records import Action

__all__ = ["history_of", "residents_of"]

_KEPT = {
    Action.ALLOC,
    Action.FREE_COMPLETED,
    Action.SEGMENT_ALLOC,
    Action.SEGMENT_FREE,
    Action.SEGMENT_MAP,
    Action.SEGMENT_UNMAP,
}
_KNOWN = {action.value for action in _KEPT}


def history_of(
    entries: Iterable[Mapping[str, Any]],
    *,
    since_ns: int,
    line_of: Callable[[Iterable[tuple[str, int]]], str | None],
) -> tuple[RecordedEvent, ...]:
    """Read one device's history.

    Args:
        entries: `device_traces` of a snapshot, of one device.
        since_ns: Earlier entries are left out; in nanoseconds since 1970.
        line_of: From a stack's files and lines, the innermost first, to the line that is shown.

    Returns:
        What was allocated and freed, in the order that it was recorded in.
    """
    return tuple(
        RecordedEvent(
            time_ns=entry["time_us"] * 1000,
            action=Action(entry["action"]),
            address=entry["addr"],
            num_bytes=entry["size"],
            operation=frames[0]["name"] if (frames := entry.get("frames") or ()) else "",
            source_line=line_of((frame["filename"], frame["line"]) for frame in frames),
        )
        for entry in entries
        if entry["action"] in _KNOWN and entry["time_us"] * 1000 >= since_ns
    )


def residents_of(
    segments: Iterable[Mapping[str, Any]], *, device_index: int
) -> tuple[tuple[Resident, ...], int]:
    """Read what a device's allocator holds.

    Args:
        segments: `segments` of a snapshot.
        device_index: Of the device.

    Returns:
        The blocks in use, and the bytes that are reserved.
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
