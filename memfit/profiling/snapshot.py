"""A simulated history in the format of `torch.cuda.memory._snapshot`, for PyTorch's viewers.

Source: the docstring of `_snapshot` in torch/cuda/memory.py, and torch/cuda/_memory_viz.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from memfit.profiling.replay import Entry, Replay
from memfit.records import Action, MemoryBlock, MemoryProfile
from memfit.simulation.allocator.segments import Segment

__all__ = ["Profiled", "snapshot_of"]

_BASE_ADDRESS: Final = 0x7F00_0000_0000
_MAX_ADDRESS: Final = 1 << 47


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """A profile, and the history behind it.

    Args:
        profile: The profile. Its cards and its advice are added later.
        snapshot: The allocator's history in PyTorch's format; `None` if it was not kept, or if
            there is no caching allocator.
    """

    profile: MemoryProfile
    snapshot: dict[str, Any] | None


def snapshot_of(replay: Replay) -> dict[str, Any]:
    """Return what `torch.cuda.memory._snapshot()` would return at the end of a replay.

    Args:
        replay: A replay that kept its history.

    Returns:
        Plain values that can be pickled: the segments at the end, and every event on device 0. Each
        frame list begins with the operation, the role and the module.
    """
    return {
        "segments": [_segment(segment, replay) for segment in replay.segments],
        "device_traces": [[_entry(entry, moment) for moment, entry in enumerate(replay.history)]],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _segment(segment: Segment, replay: Replay) -> dict[str, Any]:
    return {
        "device": 0,
        "address": _shown(segment.address),
        "total_size": segment.num_bytes,
        "allocated_size": segment.allocated_bytes,
        "active_size": segment.allocated_bytes,
        "requested_size": sum(block.requested_bytes for block in segment.blocks),
        "stream": 0,
        "segment_type": "small" if segment.is_small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {
                "address": _shown(block.address),
                "size": block.num_bytes,
                "requested_size": block.requested_bytes,
                "state": "inactive" if block.id is None else "active_allocated",
                "frames": _frames(replay.addresses.get(block.address))
                if block.id is not None
                else [],
            }
            for block in segment.blocks
        ],
    }


def _entry(entry: Entry, moment: int) -> dict[str, Any]:
    return {
        "action": entry.action.value,
        "addr": _shown(entry.address),
        "size": entry.num_bytes,
        "stream": 0,
        "time_us": moment,
        "compile_context": "N/A",
        "user_metadata": "" if entry.block is None else entry.block.role.value,
        "frames": _frames(entry.block) if entry.action is Action.ALLOC else [],
    }


def _frames(block: MemoryBlock | None) -> list[dict[str, Any]]:
    if block is None:
        return []
    filename, _, line = (block.source_line or "").rpartition(":")
    named = f"{block.operation} [{block.role.value}] in {block.module}"
    return [{"name": named, "filename": filename or block.module, "line": int(line or 0)}]


def _shown(address: int) -> int:
    # Expandable segments have addresses that need more than 47 bits.
    return _BASE_ADDRESS + address if address < _MAX_ADDRESS else address
