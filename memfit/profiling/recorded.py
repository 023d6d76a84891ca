"""Makes the blocks of a step from a device's record and from notes taken while the step ran.

Allocations are matched with notes by address and time. This module does not use torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from memfit.profiling.replay import phases_of
from memfit.records import Action, MemoryBlock, Role, Timeline
from memfit.simulation.history import HistoryEntry, Resident, segment_bytes

__all__ = [
    "KnownBlock",
    "ModuleActive",
    "Notes",
    "PhaseStart",
    "RecordedEvent",
    "assemble",
    "events_of",
]

_BEFORE: Final = "(before the step)"
_UNKNOWN: Final = "(unknown)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvent:
    """One event that an allocator recorded.

    Args:
        time_ns: Its time, in nanoseconds since 1970.
        action: What happened.
        address: The address of the block or segment.
        num_bytes: Its size.
        operation: The operation that was running, by its name in the recording.
        source_line: The line of the user's code that led to it, as `file:line`.
    """

    time_ns: int
    action: Action
    address: int
    num_bytes: int
    operation: str = ""
    source_line: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStart:
    """A phase began."""

    time_ns: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleActive:
    """From this time on another module is running, in forward or in backward."""

    time_ns: int
    module: str
    is_forward: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KnownBlock:
    """The role of the block at an address, such as a parameter's gradient."""

    time_ns: int
    address: int
    role: Role
    module: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What was noted while a step ran.

    Args:
        phases: The phases of the step.
        work: Which module was running at which time.
        settled: The role of the block at each known address.
        copies: For every module, the bytes of its parameters in autocast's type.
    """

    phases: tuple[PhaseStart, ...]
    work: tuple[ModuleActive, ...]
    settled: tuple[KnownBlock, ...]
    copies: Mapping[str, frozenset[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class _Open:
    """A block that is not freed yet."""

    module: str
    operation: str
    source_line: str | None
    requested_bytes: int
    held_bytes: int
    born: int | None
    phase: int
    is_forward: bool
    role: Role | None = None

    def closed(self, role: Role, died: int | None) -> MemoryBlock:
        return MemoryBlock(
            role=self.role or role,
            module=self.module,
            operation=self.operation,
            source_line=self.source_line,
            requested_bytes=self.requested_bytes,
            held_bytes=self.held_bytes,
            born=self.born,
            died=died,
        )


def events_of(
    history: Iterable[HistoryEntry], *, line_of: Callable[[Iterable[tuple[str, int]]], str | None]
) -> tuple[RecordedEvent, ...]:
    """Return a recorded history, each entry with the line of the user's code that led to it.

    Args:
        history: What an allocator recorded.
        line_of: A function from a stack's files and lines, the innermost first, to the line to
            show.
    """
    return tuple(
        RecordedEvent(
            time_ns=entry.time_ns,
            action=entry.action,
            address=entry.address,
            num_bytes=entry.num_bytes,
            operation=entry.frames[0].name if entry.frames else "",
            source_line=line_of((frame.filename, frame.line) for frame in entry.frames),
        )
        for entry in history
    )


def assemble(
    events: Iterable[RecordedEvent],
    residents: Sequence[Resident],
    notes: Notes,
    *,
    reserved_bytes: int | None,
) -> tuple[Timeline, tuple[MemoryBlock, ...]]:
    """Make a timeline and blocks from a recording.

    Args:
        events: What was allocated and freed, in any order.
        residents: The blocks that existed when the recording began.
        notes: What was noted while the step ran.
        reserved_bytes: Bytes that were reserved when the recording began; `None` if there is no
            caching allocator. Then reserved and allocated bytes are the same.

    Returns:
        The timeline and every block that lived in it.
    """
    sweep = _Sweep(residents, notes, reserved_bytes)
    items: list[RecordedEvent | PhaseStart | ModuleActive | KnownBlock] = [
        *notes.phases,
        *notes.work,
        *notes.settled,
        *events,
    ]
    for item in sorted(items, key=lambda item: item.time_ns):
        sweep.take(item)
    return sweep.finished()


class _Sweep:
    """Reads a recording in the order of time."""

    def __init__(
        self, residents: Sequence[Resident], notes: Notes, reserved_bytes: int | None
    ) -> None:
        self._copies = notes.copies
        self._reserved = reserved_bytes
        self._open = {
            resident.address: _Open(
                module=_BEFORE,
                operation="",
                source_line=None,
                requested_bytes=resident.requested_bytes,
                held_bytes=resident.held_bytes,
                born=None,
                phase=0,
                is_forward=False,
            )
            for resident in residents
        }
        self._allocated = sum(resident.held_bytes for resident in residents)
        self._closed: list[MemoryBlock] = []
        self._marks: list[tuple[str, int]] = []
        self._work: ModuleActive | None = None
        self._allocated_bytes: list[int] = []
        self._reserved_bytes: list[int] = []

    def take(self, item: RecordedEvent | PhaseStart | ModuleActive | KnownBlock) -> None:
        """Take the next thing that happened."""
        if isinstance(item, PhaseStart):
            self._marks.append((item.name, len(self._allocated_bytes)))
        elif isinstance(item, ModuleActive):
            self._work = item
        elif isinstance(item, KnownBlock):
            block = self._open.get(item.address)
            if block is not None and block.role is None:
                block.role, block.module = item.role, item.module
        elif item.action is Action.ALLOC:
            self._allocate(item)
        elif item.action is Action.FREE_COMPLETED:
            self._free(item.address)
        elif self._reserved is not None:
            self._reserved += segment_bytes(item.action, item.num_bytes)

    def finished(self) -> tuple[Timeline, tuple[MemoryBlock, ...]]:
        """Close the blocks that still live, and return the result."""
        living = [
            block.closed(
                Role.WORKSPACES
                if block.born is None
                else Role.BUFFERS
                if block.is_forward
                else Role.TEMPORARIES,
                None,
            )
            for block in self._open.values()
        ]
        blocks = [*living, *self._closed]
        blocks.sort(key=lambda block: -1 if block.born is None else block.born)
        timeline = Timeline(
            allocated_bytes=tuple(self._allocated_bytes),
            reserved_bytes=tuple(self._reserved_bytes),
            phases=phases_of(self._marks),
        )
        return timeline, tuple(blocks)

    @property
    def _phase(self) -> str:
        return self._marks[-1][0] if self._marks else ""

    def _allocate(self, event: RecordedEvent) -> None:
        work, phase = self._work, self._phase
        is_forward = phase == "forward" or (
            phase == "backward" and work is not None and work.is_forward
        )
        if phase == "optimizer":
            module = "(optimizer)"
        else:
            module = _UNKNOWN if work is None else work.module
        is_copy = is_forward and event.num_bytes in self._copies.get(module, ())
        self._open[event.address] = _Open(
            module=module,
            operation=event.operation,
            source_line=event.source_line,
            requested_bytes=event.num_bytes,
            held_bytes=event.num_bytes,
            born=len(self._allocated_bytes),
            phase=len(self._marks),
            is_forward=is_forward,
            role=Role.AUTOCAST_COPIES if is_copy else None,
        )
        self._allocated += event.num_bytes
        self._note()

    def _free(self, address: int) -> None:
        block = self._open.pop(address, None)
        if block is None:
            # The block is older than the recording, and nothing is known about it.
            return
        ends_where_it_began = block.phase == len(self._marks) and (
            self._phase != "backward" or (self._work is not None and self._work.is_forward)
        )
        is_kept = block.is_forward and not ends_where_it_began
        role = Role.ACTIVATIONS if is_kept else Role.TEMPORARIES
        if block.born is None:
            role = Role.WORKSPACES
        self._closed.append(block.closed(role, len(self._allocated_bytes)))
        self._allocated -= block.held_bytes
        self._note()

    def _note(self) -> None:
        self._allocated_bytes.append(self._allocated)
        self._reserved_bytes.append(self._allocated if self._reserved is None else self._reserved)
