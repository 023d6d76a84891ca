"""What a traced step allocates and frees, for any batch size.

A `Schedule` is one stretch of a step. It was recorded at one batch size, and it knows how much each
allocation grows with every further sample. A `StepSchedule` is the whole step. This module does
not use torch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from memfit.cards import Gpu
from memfit.errors import MemfitError
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import CachingAllocator
from memfit.simulation.growth import grown, matches
from memfit.simulation.needs import Need, NeedEvent, nearby_batch_size
from memfit.simulation.tensor_lines import largest_within, tensor_lines

__all__ = [
    "Schedule",
    "StepSchedule",
    "StreamsDifferError",
    "id_in_iteration",
    "traced_id",
]

_NUM_ITERATIONS = 3
# As in a measured trial: at most so many iterations (memfit.backends.readings).
_MAX_ITERATIONS = 6
_ALLOC, _ALLOC_IF_ROOM = Action.ALLOC, Action.ALLOC_IF_ROOM
_FREE_COMPLETED = Action.FREE_COMPLETED
# More than the allocations of any trace.
_IDS_OF_AN_ITERATION = 1 << 40
# A step that keeps more in every iteration is said to grow when it would double within so many.
_ITERATIONS_TO_DOUBLE = 1000


def id_in_iteration(number: int, iteration: int) -> int:
    """Return the id that an allocation has in one repetition of an iteration.

    Args:
        number: The id that it was traced with.
        iteration: Which repetition; 0 is the traced one.
    """
    return number + iteration * _IDS_OF_AN_ITERATION


def traced_id(number: int) -> int:
    """Return the id that an allocation was traced with; see `id_in_iteration`."""
    return number % _IDS_OF_AN_ITERATION


class StreamsDifferError(MemfitError):
    """Two batch sizes made different events, so other batch sizes cannot be derived from them."""


_Line = tuple[Action, int, int, float, Event]
"""An event in the form that a replay reads fastest, with what a sample adds to its bytes."""

Player = Callable[[Event, int, float], None]
"""Carries out an event, given the bytes that it asks for and the bytes that a sample adds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A stretch of events, affine in the batch size.

    Args:
        events: As recorded at `batch_size`.
        growth_bytes: For each event, how many bytes more it asks for with every further sample.
        batch_size: Samples that `events` was recorded with.
        outliving: Allocations that are still there when the stretch ends, by their ids. The number
            says how many repetitions later the stretch frees them; 0 for never.
        gpu: The card that decides the size of what is a `Need`. It is there if any event is one.
        is_rough: Slow needs are found at a batch size nearby and scaled, so that a search can look
            around quickly.
    """

    events: tuple[Event, ...]
    growth_bytes: tuple[float, ...]
    batch_size: int
    outliving: Mapping[int, int] = dataclasses.field(default_factory=dict)
    gpu: Gpu | None = None
    is_rough: bool = False
    _program: tuple[_Line, ...] = dataclasses.field(init=False, repr=False, compare=False)
    # The position of every need, that of its free, and its number among the different needs.
    _needs: tuple[tuple[int, int, int], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    _different_needs: tuple[NeedEvent, ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    _sizes: dict[Need, int] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    # The program at the last batch size: iterations are replayed one after another.
    _programs: dict[int, Sequence[_Line]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Put the events into the form that a replay reads fastest."""
        program = tuple(
            (event.action, event.id, event.num_bytes, growth, event)
            for event, growth in zip(self.events, self.growth_bytes, strict=True)
        )
        object.__setattr__(self, "_program", program)
        frees = {e.id: at for at, e in enumerate(self.events) if e.action is _FREE_COMPLETED}
        needs: list[tuple[int, int, int]] = []
        different: dict[tuple[Need, tuple[float, ...]], tuple[int, NeedEvent]] = {}
        for at, event in enumerate(self.events):
            if isinstance(event, NeedEvent):
                key = event.need, event.growth
                number, _ = different.setdefault(key, (len(different), event))
                needs.append((at, frees[event.id], number))
        object.__setattr__(self, "_needs", tuple(needs))
        object.__setattr__(self, "_different_needs", tuple(e for _, e in different.values()))

    def on(self, gpu: Gpu, *, is_rough: bool = False) -> Schedule:
        """Return this schedule with the sizes that a card decides."""
        if not self._needs:
            return self
        # A copy, because making the program anew would take longer than many replays.
        made = copy.copy(self)
        fields = {"gpu": gpu, "is_rough": is_rough, "_sizes": {}, "_programs": {}}
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        return made

    @property
    def has_slow_needs(self) -> bool:
        """Whether the size of any event takes milliseconds to find."""
        return any(event.need.is_slow for event in self._different_needs)

    @classmethod
    def fixed(cls, events: Sequence[Event]) -> Schedule:
        """Return a schedule whose bytes do not depend on the batch size."""
        return cls(events=tuple(events), growth_bytes=(0,) * len(events), batch_size=1)

    @classmethod
    def between(
        cls, events: Sequence[Event], others: Sequence[Event], *, batch_sizes: tuple[int, int]
    ) -> Schedule:
        """Make a schedule from the same stretch at two batch sizes.

        Args:
            events: Its events at the first batch size; the schedule takes over their ids.
            others: Its events at the second.
            batch_sizes: The two; they differ.

        Raises:
            StreamsDifferError: The two do not match event by event.
        """
        if not matches(events, others):
            raise StreamsDifferError(
                f"The step allocates differently at the batch sizes {batch_sizes[0]} and "
                f"{batch_sizes[1]}."
            )
        samples = batch_sizes[1] - batch_sizes[0]
        pairs = [grown(*pair, samples) for pair in zip(events, others, strict=True)]
        return cls(
            events=tuple(event for event, _ in pairs),
            growth_bytes=tuple(growth for _, growth in pairs),
            batch_size=batch_sizes[0],
        )

    def then(self, events: Sequence[Event]) -> Schedule:
        """Return this schedule followed by events that do not depend on the batch size."""
        return dataclasses.replace(
            self,
            events=self.events + tuple(events),
            growth_bytes=self.growth_bytes + (0,) * len(events),
        )

    def iteration(self, number: int) -> Schedule:
        """Return one repetition of the stretch, in which nothing takes an id that still lives.

        Args:
            number: Which one, from 0.
        """
        if not self.outliving:
            return self
        lags = self.outliving

        def named(event: Event) -> Event:
            lag = lags.get(event.id)
            if lag is None:
                return event
            then = number - lag if event.action is _FREE_COMPLETED else number
            return dataclasses.replace(event, id=id_in_iteration(event.id, then))

        return dataclasses.replace(self, events=tuple(map(named, self.events)), outliving={})

    def kept_bytes(self, batch_size: int) -> int:
        """Return the bytes that every repetition allocates and no repetition frees.

        Args:
            batch_size: Samples in each micro-batch.
        """
        lost = (
            event.num_bytes
            for event in self.at(batch_size)
            if event.action is _ALLOC and self.outliving.get(event.id) == 0
        )
        return sum(lost) if self.outliving else 0

    def without(self, origin: str) -> Schedule:
        """Return this schedule without the events of one origin."""
        kept = [
            (event, growth)
            for event, growth in zip(self.events, self.growth_bytes, strict=True)
            if event.origin != origin
        ]
        return dataclasses.replace(
            self, events=tuple(e for e, _ in kept), growth_bytes=tuple(g for _, g in kept)
        )

    def at(self, batch_size: int) -> Iterator[Event]:
        """Yield the events as they would be at a batch size."""
        more = batch_size - self.batch_size
        for _, _, num_bytes, growth, event in self._program_at(batch_size):
            asked = int(num_bytes + growth * more) if growth else num_bytes
            if asked != event.num_bytes:
                yield dataclasses.replace(event, num_bytes=max(0, asked))
            else:
                yield event

    def _program_at(self, batch_size: int) -> Sequence[_Line]:
        """Return the program with the size of every need. What needs nothing is left out."""
        if not self._needs:
            return self._program
        known = self._programs.get(batch_size)
        if known is not None:
            return known
        program: list[_Line | None] = list(self._program)
        sizes = [self._size_of(event, batch_size) for event in self._different_needs]
        for at, freed, number in self._needs:
            event = self.events[at]
            if sizes[number]:
                program[at] = (event.action, event.id, sizes[number], 0, event)
            else:
                program[at] = program[freed] = None
        found = [line for line in program if line is not None]
        self._programs.clear()
        self._programs[batch_size] = found
        return found

    def _size_of(self, event: NeedEvent, batch_size: int) -> int:
        assert self.gpu is not None, "a schedule with needs is replayed on a card"
        is_scaled = self.is_rough and event.need.is_slow
        asked = nearby_batch_size(batch_size) if is_scaled else batch_size
        need = event.need_after(asked - self.batch_size)
        num_bytes = self._sizes.get(need)
        if num_bytes is None:
            num_bytes = self._sizes[need] = need.on(self.gpu)
        return num_bytes * batch_size // asked

    def play(
        self,
        allocator: CachingAllocator,
        batch_size: int,
        *,
        player: Player | None = None,
        plans: dict[Need, int] | None = None,
    ) -> None:
        """Replay the events on an allocator.

        Args:
            allocator: The allocator.
            batch_size: Samples in each micro-batch.
            player: Carries out each event instead of the allocator, for example to record it.
            plans: What is asked for in place of what found no room before. It is kept up to date.
        """
        plans = {} if plans is None else plans
        more = batch_size - self.batch_size
        allocate, free = allocator.allocate, allocator.free
        for action, number, num_bytes, growth, event in self._program_at(batch_size):
            asked = int(num_bytes + growth * more) if growth else num_bytes
            if player is not None:
                is_need = isinstance(event, NeedEvent) and any(event.growth)
                player(event, asked, asked / batch_size if is_need else growth)
            # The code of `carry_out`, repeated because a search runs it a hundred thousand times.
            elif action is _ALLOC:
                allocate(number, asked)
            elif action is _FREE_COMPLETED:
                free(number)
            elif isinstance(event, NeedEvent) and action is _ALLOC_IF_ROOM:
                if plans:
                    asked = plans.get(event.need_after(more), asked)
                if not allocator.carry_out(action, number, asked):
                    need = event.need_after(more)
                    plans[need] = self._instead(allocator, number, need)
            else:
                allocator.carry_out(action, number, asked)

    def _instead(self, allocator: CachingAllocator, number: int, need: Need) -> int:
        """Ask for what a need takes where its bytes found no room.

        Returns:
            The bytes that found room. torch keeps the plan that needs them.

        Raises:
            AllocatorOutOfMemoryError: None of them found room.
        """
        assert self.gpu is not None
        num_bytes = 0
        for num_bytes in need.instead_on(self.gpu):
            if num_bytes <= 0 or allocator.carry_out(_ALLOC_IF_ROOM, number, num_bytes):
                return num_bytes
        allocator.allocate(number, num_bytes)
        return num_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSchedule:
    """A training step from its start.

    Args:
        setup: The allocations that exist before the first iteration: parameters, buffers,
            workspaces.
        first: The first iteration, in which the optimizer's state appears.
        later: Every further one.
    """

    setup: Schedule
    first: Schedule
    later: Schedule

    def on(self, gpu: Gpu, *, is_rough: bool = False) -> StepSchedule:
        """Return this step with the sizes that a card decides.

        Args:
            gpu: The card.
            is_rough: See `Schedule`.
        """
        parts = (self.setup, self.first, self.later)
        setup, first, later = (part.on(gpu, is_rough=is_rough) for part in parts)
        if setup is self.setup and first is self.first and later is self.later:
            return self
        return dataclasses.replace(self, setup=setup, first=first, later=later)

    @property
    def has_slow_needs(self) -> bool:
        """Whether the size of any event takes milliseconds to find."""
        return self.later.has_slow_needs

    def at(self, batch_size: int, *, num_iterations: int = _NUM_ITERATIONS) -> Iterator[Event]:
        """Yield all events of a training run's beginning.

        Args:
            batch_size: Samples in each micro-batch.
            num_iterations: Optimizer steps, at least 1.
        """
        for schedule in self._stretches(num_iterations):
            yield from schedule.at(batch_size)

    def play(self, allocator: CachingAllocator, batch_size: int) -> Iterator[int]:
        """Replay on an allocator until the peak has settled.

        Args:
            allocator: A new one.
            batch_size: Samples in each micro-batch.

        Yields:
            The peak of reserved bytes after each iteration.

        Raises:
            AllocatorOutOfMemoryError: The step does not fit.
        """
        plans: dict[Need, int] = {}
        for schedule in self.until_settled(allocator):
            schedule.play(allocator, batch_size, plans=plans)
            if schedule is not self.setup:
                yield allocator.stats.peak_reserved_bytes

    def until_settled(self, allocator: CachingAllocator) -> Iterator[Schedule]:
        """Yield the stretches to replay, one after another, until the peak has settled.

        The optimizer's state belongs to the peak from the second iteration on. A later iteration
        can still take more, because fragments move. An iteration that asks nothing of the device
        leaves the allocator as it was, so every further one would be the same, and the replay ends.
        If each iteration asks for something, it ends when two peaks agree. A step that keeps more
        in every iteration never settles. It is replayed as often as a trial would run it.

        Args:
            allocator: Where each is replayed before the next is taken.
        """
        yield self.setup
        yield self.first
        is_growing = 0 in self.later.outliving.values()
        peaks = [allocator.stats.peak_reserved_bytes]
        while len(peaks) < _MAX_ITERATIONS:
            num_calls = allocator.num_device_calls
            yield self.later.iteration(len(peaks))
            peaks.append(allocator.stats.peak_reserved_bytes)
            if is_growing:
                continue
            if allocator.num_device_calls == num_calls:
                break
            if len(peaks) >= _NUM_ITERATIONS and peaks[-1] == peaks[-2]:
                break

    def grows(self, batch_size: int, peak_bytes: int) -> bool:
        """Whether every iteration keeps so much more memory that training must run out of it.

        Args:
            batch_size: Samples in each micro-batch.
            peak_bytes: The bytes that the step takes so far.
        """
        return self.later.kept_bytes(batch_size) * _ITERATIONS_TO_DOUBLE > peak_bytes

    @property
    def heaviest(self) -> tuple[float, float]:
        """What a sample adds at most to what tensors hold, and what they hold without one."""
        return max(self._tensor_lines().items())

    def largest_within(self, num_bytes: int) -> int | None:
        """Return a batch size beyond which the step's tensors alone need more than the memory.

        Args:
            num_bytes: The bytes of the memory.

        Returns:
            The batch size, possibly 0; `None` if tensors do not grow with the batch size.
        """
        return largest_within(self._tensor_lines(), num_bytes)

    def _tensor_lines(self) -> dict[float, float]:
        return tensor_lines(
            (schedule.events, schedule.growth_bytes, schedule.batch_size)
            for schedule in self._stretches(2)
        )

    def _stretches(self, num_iterations: int) -> tuple[Schedule, ...]:
        later = (self.later.iteration(number) for number in range(1, num_iterations))
        return (self.setup, self.first, *later)
