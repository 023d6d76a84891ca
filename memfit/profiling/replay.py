"""Replays a traced step on the model of the allocator, and keeps the history of every block.

Iterations run until the peak has settled, as in a trial. The last iteration is the one that is
shown, because by then the optimizer's state exists and the allocator's cache no longer changes.
This module does not use torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from memfit.records import Action, Event, MemoryBlock, Phase, Role, Timeline
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.segments import Segment
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.schedule import (
    BLAS_HANDLE,
    BLAS_LT_HANDLE,
    Schedule,
    StepSchedule,
    traced_id,
)

__all__ = ["Entry", "Purpose", "Replay", "ReplayOutOfMemory", "phases_of", "replay"]

_BLAS: Final = "(cuBLAS)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What one allocation is for.

    Args:
        role: Its role.
        module: The path of its module, or a name such as `(loss)` in its place.
        source_line: The line that led to it, as `file:line`.
    """

    role: Role
    module: str
    source_line: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of an allocator's history.

    Args:
        action: What happened.
        address: The address of the block or segment.
        num_bytes: The size of the block that was handed out, or of the segment.
        block: The block; `None` for a segment.
    """

    action: Action
    address: int
    num_bytes: int
    block: MemoryBlock | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOutOfMemory:
    """The request that found no room.

    Args:
        request: The request.
        phase: The phase of the step; `None` before its first phase.
        reserved_bytes: Bytes that the allocator had reserved by then.
        allocated_bytes: Bytes that it had handed out.
    """

    request: MemoryBlock
    phase: str | None
    reserved_bytes: int
    allocated_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The result of a replay.

    Args:
        timeline: The last iteration.
        blocks: The blocks that lived in it, in the order of allocation.
        history: Every event since the start; empty if it was not kept.
        segments: The segments that the allocator holds at the end.
        addresses: The blocks in these segments, by address.
    """

    timeline: Timeline
    blocks: tuple[MemoryBlock, ...]
    history: tuple[Entry, ...]
    segments: tuple[Segment, ...]
    addresses: Mapping[int, MemoryBlock]


def replay(
    schedule: StepSchedule,
    batch_size: int,
    *,
    purpose: Callable[[int], Purpose],
    settings: AllocatorSettings,
    capacity_bytes: int | None = None,
    keeps_history: bool = False,
) -> Replay | ReplayOutOfMemory:
    """Replay a step until its peak has settled.

    Args:
        schedule: Its events.
        batch_size: Samples in each micro-batch.
        purpose: A function from an allocation of the schedule to its purpose.
        settings: The allocator's options.
        capacity_bytes: Bytes that the allocator can reserve; `None` for no limit.
        keeps_history: Keep every event, so that a snapshot can be made.

    Returns:
        The last iteration, or the request that found no room.
    """
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, settings=settings)
    run = _Run(allocator, batch_size, purpose, keeps_history=keeps_history)
    try:
        for stretch in schedule.until_settled(allocator):
            run.start()
            run.play(stretch)
    except _NoRoomError as error:
        return error.out_of_room
    return run.finished()


def phases_of(marks: list[tuple[str, int]]) -> tuple[Phase, ...]:
    """Return phases, numbered by micro-batch, from their names and first moments."""
    phases = []
    num_forwards = 0
    for name, begin in marks:
        num_forwards += name == "forward"
        micro_batch = None if name == "optimizer" else max(0, num_forwards - 1)
        phases.append(Phase(name=name, begin=begin, micro_batch=micro_batch))
    return tuple(phases)


class _NoRoomError(Exception):
    def __init__(self, out_of_room: ReplayOutOfMemory) -> None:
        super().__init__()
        self.out_of_room = out_of_room


@dataclasses.dataclass(slots=True)
class _Open:
    """A block that may still be freed."""

    block: MemoryBlock
    address: int


class _Run:
    """A replay that is running."""

    def __init__(
        self,
        allocator: CachingAllocator,
        batch_size: int,
        purpose: Callable[[int], Purpose],
        *,
        keeps_history: bool,
    ) -> None:
        self._allocator = allocator
        self._batch_size = batch_size
        self._purpose = purpose
        self._keeps_history = keeps_history
        self._history: list[Entry] = []
        self._segments: dict[int, int] = {}
        self._open: dict[int, _Open] = {}
        self._closed: list[MemoryBlock] = []
        self._marks: list[tuple[str, int]] = []
        self._allocated: list[int] = []
        self._reserved: list[int] = []

    def start(self) -> None:
        """Begin an iteration. The blocks that live now were made before it."""
        for held in self._open.values():
            held.block = dataclasses.replace(held.block, born=None)
        self._closed, self._marks, self._allocated, self._reserved = [], [], [], []

    def play(self, schedule: Schedule) -> None:
        """Carry out a stretch of events."""
        schedule.watch(self._carry_out, self._batch_size)

    def _carry_out(self, event: Event, num_bytes: int, growth: float) -> None:
        if event.action is Action.USER_DEFINED:
            self._marks.append((event.origin, len(self._allocated)))
            self._allocator.carry_out(event.action, event.id, num_bytes)
            return
        if event.action.is_request:
            if not self._allocate(event, num_bytes, growth):
                return
        elif event.action is Action.FREE_COMPLETED:
            if not self._free(event.id):
                return
        elif event.action is Action.EMPTY_CACHE:
            self._allocator.empty_cache()
            self._note_segments()
        stats = self._allocator.stats
        self._allocated.append(stats.allocated_bytes)
        self._reserved.append(stats.reserved_bytes)

    def finished(self) -> Replay:
        """Return the result, with the last iteration."""
        living = [held.block for held in self._open.values()]
        blocks = [*living, *self._closed]
        return Replay(
            timeline=Timeline(
                allocated_bytes=tuple(self._allocated),
                reserved_bytes=tuple(self._reserved),
                phases=phases_of(self._marks),
            ),
            blocks=tuple(
                sorted(blocks, key=lambda block: -1 if block.born is None else block.born)
            ),
            history=tuple(self._history),
            segments=self._allocator.segments(),
            addresses={held.address: held.block for held in self._open.values()},
        )

    def _allocate(self, event: Event, num_bytes: int, growth: float) -> bool:
        if num_bytes <= 0:
            return False
        event = dataclasses.replace(event, num_bytes=num_bytes)
        allocator = self._allocator
        before = allocator.stats
        try:
            if not allocator.carry_out(event.action, event.id, num_bytes):
                return False
        except AllocatorOutOfMemoryError:
            raise _NoRoomError(
                ReplayOutOfMemory(
                    request=self._block(event, event.num_bytes, growth),
                    phase=self._marks[-1][0] if self._marks else None,
                    reserved_bytes=before.reserved_bytes,
                    allocated_bytes=before.allocated_bytes,
                )
            ) from None
        after = allocator.stats
        block = self._block(event, after.allocated_bytes - before.allocated_bytes, growth)
        held = _Open(block, 0)
        self._open[event.id] = held
        if self._keeps_history:
            if (before.reserved_bytes, before.num_alloc_retries) != (
                after.reserved_bytes,
                after.num_alloc_retries,
            ):
                self._note_segments()
            held.address = allocator.address_of(event.id)
            self._history.append(
                Entry(
                    action=Action.ALLOC,
                    address=held.address,
                    num_bytes=block.held_bytes,
                    block=block,
                )
            )
        return True

    def _block(self, event: Event, held_bytes: int, growth: float) -> MemoryBlock:
        if event.origin in (BLAS_HANDLE, BLAS_LT_HANDLE):
            purpose = Purpose(role=Role.WORKSPACES, module=_BLAS)
        elif event.origin == "prefetched batch":
            purpose = Purpose(role=Role.INPUTS, module="(batch)")
        else:
            purpose = self._purpose(traced_id(event.id))
        return MemoryBlock(
            role=purpose.role,
            module=purpose.module,
            operation=event.origin,
            source_line=purpose.source_line,
            requested_bytes=event.num_bytes,
            held_bytes=held_bytes,
            born=len(self._allocated),
            bytes_per_sample=growth,
        )

    def _free(self, number: int) -> bool:
        held = self._open.pop(number, None)
        if held is None:
            return False
        self._allocator.free(number)
        self._closed.append(dataclasses.replace(held.block, died=len(self._allocated)))
        if self._keeps_history:
            self._history += [
                Entry(
                    action=action,
                    address=held.address,
                    num_bytes=held.block.held_bytes,
                    block=held.block,
                )
                for action in (Action.FREE_REQUESTED, Action.FREE_COMPLETED)
            ]
        return True

    def _note_segments(self) -> None:
        if not self._keeps_history:
            return
        segments = {segment.address: segment.num_bytes for segment in self._allocator.segments()}
        for address, num_bytes in self._segments.items():
            if segments.get(address) != num_bytes:
                self._write_segment(Action.SEGMENT_FREE, address, num_bytes)
        for address, num_bytes in segments.items():
            if self._segments.get(address) != num_bytes:
                self._write_segment(Action.SEGMENT_ALLOC, address, num_bytes)
        self._segments = segments

    def _write_segment(self, action: Action, address: int, num_bytes: int) -> None:
        self._history.append(Entry(action=action, address=address, num_bytes=num_bytes))
