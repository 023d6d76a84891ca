"""A real allocator's history, as PyTorch records it, compared with a replay of the same requests.

`torch.cuda.memory._record_memory_history` notes every request and every segment taken from the
device. A replay of the requests has to take the same segments. `disagreement` says where it first
does not. One device and one stream are handled.

Source: torch/cuda/_memory_viz.py and torch/cuda/memory.py (`_snapshot`: the format).
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.errors import UsageError
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings

__all__ = ["Disagreement", "disagreement", "load", "read_history", "save"]

_TAKEN = {Action.SEGMENT_ALLOC: 1, Action.SEGMENT_MAP: 1}
_GIVEN_BACK = {Action.SEGMENT_FREE: -1, Action.SEGMENT_UNMAP: -1}
_SIGNS = _TAKEN | _GIVEN_BACK
_KEPT = {Action.ALLOC, Action.FREE_COMPLETED, Action.OOM, *_SIGNS}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Where a replay first differs from what was recorded.

    Args:
        index: Of the event.
        event: The event.
        recorded_bytes: What the real allocator had reserved after it.
        replayed_bytes: What the replay had.
    """

    index: int
    event: Event
    recorded_bytes: int
    replayed_bytes: int


def read_history(entries: Iterable[Mapping[str, Any]]) -> tuple[Event, ...]:
    """Read one device's history.

    Args:
        entries: `torch.cuda.memory._snapshot()["device_traces"][device]`, recorded from the start
            of the process.

    Returns:
        Its events; `id` is the address.

    Raises:
        UsageError: It has more than one stream.
    """
    events = []
    streams = set()
    for entry in entries:
        try:
            action = Action(entry["action"])
        except ValueError:
            continue
        if action not in _KEPT:
            continue
        streams.add(entry.get("stream", 0))
        address = entry.get("addr", entry.get("device_free", 0))
        events.append(Event(action=action, id=address, num_bytes=entry["size"]))
    if len(streams) > 1:
        raise UsageError(f"The history has {len(streams)} streams, and one can be replayed.")
    return tuple(events)


def disagreement(
    events: Sequence[Event],
    *,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
) -> Disagreement | None:
    """Replay the requests of a history, and compare what is reserved after every one.

    Args:
        events: A history from an empty allocator.
        settings: The options it ran with.
        capacity_bytes: What the real allocator could take; `None` where it never ran short.

    Returns:
        The first difference; `None` where there is none.
    """
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, settings=settings)
    recorded = 0
    for index, event in enumerate(events):
        if event.action in _SIGNS:
            recorded += _SIGNS[event.action] * event.num_bytes
            continue
        if event.action is Action.ALLOC:
            try:
                allocator.allocate(event.id, event.num_bytes)
            except AllocatorOutOfMemoryError:
                return Disagreement(
                    index=index,
                    event=event,
                    recorded_bytes=recorded,
                    replayed_bytes=allocator.stats.reserved_bytes,
                )
        elif event.action is Action.FREE_COMPLETED:
            allocator.free(event.id)
            continue
        replayed = allocator.stats.reserved_bytes
        if event.action is Action.ALLOC and replayed != recorded:
            return Disagreement(
                index=index, event=event, recorded_bytes=recorded, replayed_bytes=replayed
            )
    return None


def save(events: Iterable[Event], path: Path) -> None:
    """Write events to a small compressed file.

    Args:
        events: What to keep; addresses become small numbers, and origins are left out.
        path: Where to; it ends in `.json.gz`.
    """
    numbers: dict[int, int] = {}
    rows = [
        [event.action.value, numbers.setdefault(event.id, len(numbers)), event.num_bytes]
        for event in events
    ]
    path.write_bytes(gzip.compress(json.dumps(rows, separators=(",", ":")).encode(), mtime=0))


def load(path: Path) -> tuple[Event, ...]:
    """Read what `save` wrote."""
    rows = json.loads(gzip.decompress(path.read_bytes()))
    return tuple(
        Event(action=Action(action), id=number, num_bytes=num_bytes)
        for action, number, num_bytes in rows
    )
