"""A stretch of events in the form that a replay reads fastest.

Most events grow evenly with the batch size. The bytes of a `NeedEvent` are found for a card and a
batch size. This module does not use torch.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence

from memfit.cards import Gpu
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.compiled import CompiledAllocator, EventTable
from memfit.simulation.needs import Need, NeedEvent, nearby_batch_size

__all__ = ["Allocator", "CardSizes", "NeedNumbers", "Player", "Program"]

_ALLOC, _ALLOC_IF_ROOM = Action.ALLOC, Action.ALLOC_IF_ROOM
_FREE_COMPLETED = Action.FREE_COMPLETED

Allocator = CachingAllocator | CompiledAllocator

_Line = tuple[Action, int, int, float, Event]
"""An event with what a sample adds to its bytes."""

Player = Callable[[Event, int, float], None]
"""Carries out an event, given the bytes that it asks for and the bytes that a sample adds."""


_Numbered = tuple[tuple[int, NeedEvent, int], ...]
"""The needs of a program: each with its number, its event, and the batch size of the recording."""


class NeedNumbers:
    """Numbers for the needs of a step's programs. The same need has the same number in all."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._needs_of: dict[Program, _Numbered] = {}

    def of(self, program: Program) -> _Numbered:
        """Return the needs of a program with their numbers."""
        found = self._needs_of.get(program)
        if found is None:
            found = self._needs_of[program] = tuple(self._numbered(program))
        return found

    def _numbered(self, program: Program) -> Iterator[tuple[int, NeedEvent, int]]:
        recorded = program.batch_size
        for event in program.different_needs:
            # What the need would be without samples, if that is known exactly.
            is_even = all(map(float.is_integer, map(float, event.growth)))
            back = -recorded if is_even else 0
            key = event.need_after(back), event.growth, recorded + back
            yield self._numbers.setdefault(key, len(self._numbers)), event, recorded


class CardSizes:
    """The sizes of needs on a card, each found once.

    Args:
        gpu: The card.
        numbers: The numbers of the needs, which are the same for every card.
        is_rough: Slow needs are found at a batch size nearby and scaled, so that a search can look
            around quickly.
    """

    def __init__(self, gpu: Gpu, numbers: NeedNumbers, *, is_rough: bool = False) -> None:
        self.gpu = gpu
        self._numbers = numbers
        self._is_rough = is_rough
        self._sizes: dict[tuple[int, int | None], int] = {}
        # The even ones, as their bytes without samples and what each sample adds.
        self._lines: dict[int, tuple[int, int] | None] = {}

    def of(self, program: Program, batch_size: int) -> list[int]:
        """Return the bytes of each different need of a program, at a batch size."""
        nearby = nearby_batch_size(batch_size) if self._is_rough else batch_size
        found = []
        for number, event, recorded in self._numbers.of(program):
            if number not in self._lines:
                line = event.line_on(self.gpu)
                self._lines[number] = line and (line[0] - line[1] * recorded, line[1])
            line = self._lines[number]
            if line is not None:
                found.append(line[0] + line[1] * batch_size)
                continue
            asked = nearby if event.need.is_slow else batch_size
            # What does not grow is found once for all batch sizes.
            key = number, asked if any(event.growth) else None
            num_bytes = self._sizes.get(key)
            if num_bytes is None:
                num_bytes = event.bytes_after(asked - recorded, self.gpu)
                self._sizes[key] = num_bytes
            found.append(num_bytes * batch_size // asked)
        return found


class Program:
    """A stretch of events.

    Args:
        events: As recorded at `batch_size`.
        growth_bytes: For each event, what a further sample adds to its bytes.
        batch_size: Samples that the events were recorded with.
    """

    def __init__(
        self, events: Sequence[Event], growth_bytes: Sequence[float], batch_size: int
    ) -> None:
        self._events = events
        self._growth_bytes = growth_bytes
        self.batch_size = batch_size

    @functools.cached_property
    def _lines(self) -> tuple[_Line, ...]:
        return tuple(
            (event.action, event.id, event.num_bytes, growth, event)
            for event, growth in zip(self._events, self._growth_bytes, strict=True)
        )

    @functools.cached_property
    def _numbered_needs(self) -> tuple[dict[int, int], tuple[NeedEvent, ...]]:
        different: dict[tuple[Need, tuple[float, ...]], tuple[int, NeedEvent]] = {}
        numbers = {}
        for at, event in enumerate(self._events):
            if isinstance(event, NeedEvent):
                key = event.need, event.growth
                numbers[at], _ = different.setdefault(key, (len(different), event))
        return numbers, tuple(event for _, event in different.values())

    @property
    def _needs(self) -> dict[int, int]:
        """For each need, by the position of its event, its number among the different needs."""
        return self._numbered_needs[0]

    @property
    def different_needs(self) -> tuple[NeedEvent, ...]:
        """An event of each need."""
        return self._numbered_needs[1]

    @functools.cached_property
    def _table(self) -> EventTable:
        return EventTable(self._lines, self._needs)

    @functools.cached_property
    def _frees(self) -> dict[int, int]:
        return {line[1]: at for at, line in enumerate(self._lines) if line[0] is _FREE_COMPLETED}

    def at(self, batch_size: int, sizes: CardSizes | None) -> Sequence[_Line]:
        """Return the events with the size of every need. What needs nothing is left out.

        Args:
            batch_size: Samples in each micro-batch.
            sizes: The sizes of the needs. They are there if any event is one.
        """
        if not self._needs:
            return self._lines
        program: list[_Line | None] = list(self._lines)
        found = self._sizes_at(batch_size, sizes)
        for at, number in self._needs.items():
            event = self._events[at]
            if found[number]:
                program[at] = (event.action, event.id, found[number], 0, event)
            else:
                program[at] = None
                freed_at = self._frees.get(event.id)
                if freed_at is not None:
                    program[freed_at] = None
        return [line for line in program if line is not None]

    def _sizes_at(self, batch_size: int, sizes: CardSizes | None) -> list[int]:
        if not self.different_needs:
            return []
        assert sizes is not None, "a schedule with needs is replayed on a card"
        return sizes.of(self, batch_size)

    def events_at(
        self, batch_size: int, sizes: CardSizes | None
    ) -> Iterator[tuple[Event, int, float]]:
        """Yield each event, the bytes that it asks for, and what a further sample adds to them."""
        more = batch_size - self.batch_size
        for _, _, num_bytes, growth, event in self.at(batch_size, sizes):
            yield event, int(num_bytes + growth * more) if growth else num_bytes, growth

    def play(
        self,
        allocator: Allocator,
        batch_size: int,
        *,
        sizes: CardSizes | None,
        plans: dict[Need, int],
    ) -> None:
        """Replay the events on an allocator; see `Schedule.play`."""
        if isinstance(allocator, CompiledAllocator):
            self._play_compiled(allocator, batch_size, sizes, plans)
            return
        more = batch_size - self.batch_size
        allocate, free = allocator.allocate, allocator.free
        for action, number, num_bytes, growth, event in self.at(batch_size, sizes):
            asked = int(num_bytes + growth * more) if growth else num_bytes
            # The code of `carry_out`, repeated because a search runs it a hundred thousand times.
            if action is _ALLOC:
                allocate(number, asked)
            elif action is _FREE_COMPLETED:
                free(number)
            elif isinstance(event, NeedEvent) and action is _ALLOC_IF_ROOM:
                if plans:
                    asked = plans.get(event.need_after(more), asked)
                if not allocator.carry_out(action, number, asked):
                    need = event.need_after(more)
                    plans[need] = _instead(allocator, number, need, sizes)
            else:
                allocator.carry_out(action, number, asked)

    def _play_compiled(
        self,
        allocator: CompiledAllocator,
        batch_size: int,
        sizes: CardSizes | None,
        plans: dict[Need, int],
    ) -> None:
        more = batch_size - self.batch_size
        found = array("q", self._sizes_at(batch_size, sizes))
        start: int | None = 0
        while start is not None:
            taken = array("q", self._plans_taken(plans, more))
            start = allocator.play(self._table, more, sizes=found, plans=taken, start=start)
            if start is not None:
                event = self._events[self._table.positions[start]]
                assert isinstance(event, NeedEvent)
                need = event.need_after(more)
                plans[need] = _instead(allocator, event.id, need, sizes)
                start += 1

    def _plans_taken(self, plans: dict[Need, int], more: int) -> list[int]:
        """Return the bytes of the plan that was taken in place of each need's own, or -1."""
        if not plans:
            return [-1] * len(self.different_needs)
        return [plans.get(event.need_after(more), -1) for event in self.different_needs]


def _instead(allocator: Allocator, number: int, need: Need, sizes: CardSizes | None) -> int:
    """Ask for what a need takes where its bytes found no room.

    Returns:
        The bytes that found room. torch keeps the plan that needs them.

    Raises:
        AllocatorOutOfMemoryError: None of them found room.
    """
    assert sizes is not None
    num_bytes = 0
    for num_bytes in need.instead_on(sizes.gpu):
        try:
            allocator.allocate(number, num_bytes)
        except AllocatorOutOfMemoryError:
            continue
        return num_bytes
    allocator.allocate(number, num_bytes)
    return num_bytes
