"""Adds up the bytes of a step's blocks at its peak, by role and by module. Does not use torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from memfit.records import MemoryBlock, ModuleShare, Peak, Role, RoleShare, Timeline

__all__ = ["CACHED", "CONTEXT", "ROUNDING", "peak_moment", "peak_of"]

ROUNDING = "(rounding)"
CACHED = "(cached, free)"
CONTEXT = "(CUDA context)"


def peak_moment(timeline: Timeline) -> int:
    """Return the moment of the peak.

    The peak has the most reserved bytes. Among such moments it is the one with the most allocated
    bytes.

    Args:
        timeline: At least one moment.
    """
    most = max(timeline.reserved_bytes)
    return max(
        (moment for moment, reserved in enumerate(timeline.reserved_bytes) if reserved == most),
        key=timeline.allocated_bytes.__getitem__,
    )


def peak_of(blocks: Iterable[MemoryBlock], timeline: Timeline, *, context_bytes: int = 0) -> Peak:
    """Add up a step's peak.

    Args:
        blocks: Every allocation of the timeline. The blocks that live at a moment add up to its
            allocated bytes.
        timeline: The step.
        context_bytes: Bytes of the device that the process takes outside the allocator.

    Returns:
        The peak. Its roles add up to its total, and so do its modules.

    Raises:
        ValueError: The blocks do not add up to the bytes of the timeline.
    """
    moment = peak_moment(timeline)
    allocated, reserved = timeline.allocated_bytes[moment], timeline.reserved_bytes[moment]
    live = [block for block in blocks if block.lives_at(moment)]
    modules: dict[tuple[str, Role], int] = defaultdict(int)
    growth: dict[Role, list[float | None]] = defaultdict(list)
    for block in live:
        modules[block.module, block.role] += block.requested_bytes
        growth[block.role].append(block.bytes_per_sample)
    slack = sum(block.held_bytes - block.requested_bytes for block in live)
    remainders = (
        (ROUNDING, Role.SLACK, slack),
        (CACHED, Role.FRAGMENTATION, reserved - allocated),
        (CONTEXT, Role.CONTEXT, context_bytes),
    )
    for name, role, num_bytes in remainders:
        if num_bytes:
            modules[name, role] += num_bytes
    sums: dict[Role, int] = defaultdict(int)
    for (_, role), num_bytes in modules.items():
        sums[role] += num_bytes
    phase = timeline.phase_at(moment)
    return Peak(
        moment=moment,
        phase=None if phase is None else phase.name,
        reserved_bytes=reserved,
        allocated_bytes=allocated,
        context_bytes=context_bytes,
        roles=tuple(
            RoleShare(role=role, num_bytes=sums[role], bytes_per_sample=_total(growth[role]))
            for role in Role
            if role in sums
        ),
        modules=tuple(
            ModuleShare(module=module, role=role, num_bytes=num_bytes)
            for (module, role), num_bytes in sorted(
                modules.items(), key=lambda item: (-item[1], item[0])
            )
        ),
    )


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
